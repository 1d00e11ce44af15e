// The four stages on the CPU. `attend` runs plan, attend and combine; `mix` runs whole tiles.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/append.h"
#include "core/explanation.h"
#include "core/mixture.h"
#include "core/params.h"
#include "core/schedule.h"
#include "core/selection.h"

namespace flux::cpu {

// Who runs the workers. The torch operators bring torch's threads, the tests their own.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int num_workers() const = 0;
  virtual void run(int64_t n, const std::function<void(int64_t)>& body) const = 0;  // body(0) .. body(n - 1)
};

// All visible work of one call, cut into one range per worker.
struct Plan {
  std::vector<Tile> tiles;        // [num_tiles]
  std::vector<int64_t> cost;      // [num_tiles + 1], prefix sums
  std::vector<WorkRange> ranges;  // [num_workers]
};

Plan plan(const AttendParams& p, const TileShape& tile, int num_workers);

void route(const RouteParams& p, const Executor& executor);
void attend(const AttendParams& p, const Executor& executor);
Explanation explain(const AttendParams& p, const Executor& executor);
void attend_backward(const AttendBackwardParams& p, const Executor& executor);
// A mixture of the two patterns instead of a choice.
void mix(const AttendParams& p, const Mixture& m, const Executor& executor);
void mix_backward(const AttendBackwardParams& p, const Mixture& m, const Executor& executor);
void append(const AppendParams& p, const Executor& executor);
void select(const SelectParams& p, const Executor& executor);

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
// What the kernels in use were compiled for: one of these names.
// Throws std::invalid_argument, as attend and attend_backward do, where FLUX_EXT_ISA is none of these.
const char* isa();

}  // namespace flux::cpu
