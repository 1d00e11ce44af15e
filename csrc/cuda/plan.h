// What a block needs to plan: scans, the way from a tile's number to the tile; and the plan of a small problem, which
// every block of an attend kernel makes for itself (a launch less, which a decode step feels).
#pragma once

#include "cuda/worker.h"

namespace flux::cuda {

// values[i] becomes the sum of those before it, values[n] the sum of all; any kThreads in a row must sum to 31 bits.
template <int kThreads, typename Int>
__device__ void exclusive_sum(Int* values, int32_t n, int32_t* warp_sums) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Int carry = 0;
  for (int32_t first = 0; first < n; first += kThreads) {
    const int32_t i = first + int32_t(threadIdx.x);
    const int32_t own = i < n ? int32_t(values[i]) : 0;
    int32_t sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int32_t before = 0, all = lane < kWarps ? warp_sums[lane] : 0;  // every warp sums the warps for itself
    before = __reduce_add_sync(~0u, lane < warp ? all : 0);
    all = __reduce_add_sync(~0u, all);
    if (i < n) values[i] = carry + before + sum - own;
    carry += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) values[n] = carry;
  __syncthreads();
}

// The row that a tile belongs to: the last with begin[row] <= tile that has any.
__device__ inline int32_t find_row(const int32_t* begin, int32_t rows, int32_t tile) {
  int32_t lo = 0, hi = rows;
  while (hi - lo > 1) {
    const int32_t mid = (lo + hi) / 2;
    (begin[mid] <= tile ? lo : hi) = mid;
  }
  return lo;
}

// The tiles of a row stand from its last query block to its first.
__device__ inline Tile make_tile(const ProblemShape& s, int32_t row, int32_t count, int32_t index) {
  return {row / s.num_kv_heads, row % s.num_kv_heads, count - 1 - index};
}

struct InlinePlan {  // shared memory, until the plan is made
  int64_t cost[kInlineTiles + 1];
  int32_t begin[kInlineTiles + 1];
  int32_t warp_sums[32];
  Position bounds[2];
};

// The plan of a problem that plans_inline. A block writes what is its own (its range, its tiles; the first block the
// header), for itself and for the combine stage.
template <int kThreads>
__device__ BlockPlan plan_inline(const ProblemShape& s, const TileShape& tile, int32_t num_workers,
                                 const PlanView& plan, InlinePlan& shared) {
  const int32_t rows = s.batch * s.num_kv_heads, tid = threadIdx.x;
  for (int32_t r = tid; r < rows; r += kThreads)
    shared.begin[r] = tiles_in_row(s, tile, r / s.num_kv_heads, r % s.num_kv_heads);
  __syncthreads();
  exclusive_sum<kThreads>(shared.begin, rows, shared.warp_sums);
  const int32_t num_tiles = min_of(shared.begin[rows], int32_t(max_tiles(s, tile)));
  const auto tile_at = [&](int32_t t) {
    const int32_t row = find_row(shared.begin, rows, t);
    return make_tile(s, row, shared.begin[row + 1] - shared.begin[row], t - shared.begin[row]);
  };
  for (int32_t t = tid; t < num_tiles; t += kThreads) shared.cost[t] = tile_cost(view_tile(s, tile, tile_at(t)));
  __syncthreads();
  exclusive_sum<kThreads>(shared.cost, num_tiles, shared.warp_sums);

  const int32_t sharing = sharing_workers(shared.cost[num_tiles], num_workers), worker = blockIdx.x;
  if (tid % 32 == 0 && tid < 64)
    shared.bounds[tid / 32] =
        worker < sharing ? share_begin(shared.cost, num_tiles, worker + tid / 32, sharing) : Position{num_tiles, 0};
  __syncthreads();
  BlockPlan own;
  own.header = {num_tiles, sharing, 0, num_workers};
  own.range = {shared.bounds[0].tile, shared.bounds[0].block, shared.bounds[1].tile, shared.bounds[1].block};
  for (int32_t t = own.range.tile + tid; t < tiles_end(own.range); t += kThreads) plan.tiles[t] = tile_at(t);
  if (tid == 0) {
    plan.ranges[worker] = own.range;
    if (worker == 0) *plan.header = own.header;
  }
  __syncthreads();
  return own;
}

}  // namespace flux::cuda
