// Running the pieces of a stage, and the memory they work in.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>

#include "cpu/cpu.h"

namespace flux::cpu {

// Floats on a cache line boundary; not initialised.
class Buffer {
 public:
  explicit Buffer(size_t floats) : data_(static_cast<float*>(::operator new(floats * sizeof(float), kAlign))) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<float, Free> data_;
};

// body(i, scratch) for i = 0 .. n - 1 in that order, each by the next worker that is free.
template <typename Body>
void run_dynamic(const Executor& executor, int64_t n, size_t scratch_floats, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = executor.num_workers() < n ? executor.num_workers() : n;
  executor.run(workers, [&](int64_t) {
    const Buffer scratch(scratch_floats);
    for (int64_t i = next++; i < n; i = next++) body(i, scratch.data());
  });
}

}  // namespace flux::cpu
