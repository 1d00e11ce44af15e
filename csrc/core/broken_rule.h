// How the message begins where an argument, or a setting, breaks a rule.
#pragma once

namespace flux {

// Python makes a ValueError of it (flux_ext/operators/arguments.py). The message says so because the type does not
// arrive: up to torch 2.14 std::invalid_argument is a ValueError in Python, from 2.15 on a RuntimeError, like every C++
// exception.
inline constexpr char kBrokenRule[] = "invalid argument: ";

}  // namespace flux
