// What a block needs to plan: scans, the way from a tile's number to the tile; and the plan of a small problem, which
// the blocks of the attend and combine kernels make for themselves (a launch less, which a decode step feels).
#pragma once

#include "cuda/worker.h"

namespace flux::cuda {

// values[i] becomes the sum of those before it, values[n] the sum of all, or the largest Int; any kThreads in a row
// must sum to 31 bits.
template <int kThreads, typename Int>
__device__ void exclusive_sum(Int* values, int32_t n, int32_t* warp_sums) {
  constexpr int kWarps = kThreads / 32;
  constexpr int64_t kLargest = sizeof(Int) == 4 ? INT32_MAX : INT64_MAX;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t carry = 0;
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
    if (i < n) values[i] = Int(min(carry + before + sum - own, kLargest));
    carry += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) values[n] = Int(min(carry, kLargest));
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

// The line of work of a problem that plans_inline: tile t is row t, which has no other.
struct InlineLine {
  int64_t begin[kInlineTiles + 1];  // cost of the tiles before each; of all
  int32_t cost[kInlineTiles];
};

__device__ inline Tile inline_tile(const ProblemShape& s, int32_t t) {
  return {t / s.num_kv_heads, t % s.num_kv_heads, 0};
}

// Fills the line, in shared memory, and returns how many tiles it has. Each is shown to keep(t, view) by one thread.
template <int kThreads, typename Keep>
__device__ int32_t line_up(const ProblemShape& s, const TileShape& tile, InlineLine& line, Keep keep) {
  const int32_t num_tiles = s.batch * s.num_kv_heads;
  for (int32_t t = threadIdx.x; t < num_tiles; t += kThreads) {
    const TileView view = view_tile(s, tile, inline_tile(s, t));
    line.cost[t] = tile_cost(view);
    keep(t, view);
  }
  __syncthreads();
  if (const int lane = threadIdx.x; lane < 32) {
    int64_t before = 0;
    for (int32_t t = lane; t - lane < num_tiles; t += 32) {
      const int32_t own = t < num_tiles ? line.cost[t] : 0;
      int32_t sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int32_t other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (t < num_tiles) line.begin[t] = before + sum - own;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) line.begin[num_tiles] = before;
  }
  __syncthreads();
  return num_tiles;
}

// The even share of a worker that has one.
__device__ inline WorkRange share_of(const InlineLine& line, int32_t num_tiles, int32_t worker, int32_t sharing) {
  // Even lanes find where it begins, odd ones where it ends.
  const Position p = share_begin(line.begin, num_tiles, worker + int32_t(threadIdx.x % 2), sharing);
  return {__shfl_sync(~0u, p.tile, 0), __shfl_sync(~0u, p.block, 0), __shfl_sync(~0u, p.tile, 1),
          __shfl_sync(~0u, p.block, 1)};
}

}  // namespace flux::cuda
