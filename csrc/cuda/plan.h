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

// The line of work of a problem that plans_inline.
struct InlineLine {
  int64_t cost[kInlineTiles + 1];
  int32_t warp_sums[32];
  Position bounds[2];
};

// The tiles of the line by number, from where the tiles of every row begin.
struct InlineTiles {
  const ProblemShape& shape;
  const int32_t* begin;  // [rows + 1], shared memory

  __device__ Tile operator()(int32_t t) const {
    const int32_t row = find_row(begin, shape.batch * shape.num_kv_heads, t);
    return make_tile(shape, row, begin[row + 1] - begin[row], t - begin[row]);
  }
};

// Fills line.cost and row_begin [kInlineTiles + 1]; returns the number of tiles.
template <int kThreads>
__device__ int32_t line_up(const ProblemShape& s, const TileShape& tile, InlineLine& line, int32_t* row_begin) {
  const int32_t rows = s.batch * s.num_kv_heads, tid = threadIdx.x;
  for (int32_t r = tid; r < rows; r += kThreads)
    row_begin[r] = min_of(tiles_in_row(s, tile, r / s.num_kv_heads, r % s.num_kv_heads), kInlineTiles);
  __syncthreads();
  exclusive_sum<kThreads>(row_begin, rows, line.warp_sums);
  const int32_t num_tiles = min_of(row_begin[rows], kInlineTiles);  // spans that overlap would make more
  const InlineTiles tile_at{s, row_begin};
  for (int32_t t = tid; t < num_tiles; t += kThreads) line.cost[t] = tile_cost(view_tile(s, tile, tile_at(t)));
  __syncthreads();
  exclusive_sum<kThreads>(line.cost, num_tiles, line.warp_sums);
  return num_tiles;
}

// What a block of the attend kernel has to do.
template <int kThreads>
__device__ BlockPlan plan_inline(const ProblemShape& s, const TileShape& tile, InlineLine& line, int32_t* row_begin) {
  const int32_t num_tiles = line_up<kThreads>(s, tile, line, row_begin), num_workers = gridDim.x, worker = blockIdx.x;
  const int32_t sharing = sharing_workers(line.cost[num_tiles], num_workers), tid = threadIdx.x;
  if (tid % 32 == 0 && tid < 64)
    line.bounds[tid / 32] =
        worker < sharing ? share_begin(line.cost, num_tiles, worker + tid / 32, sharing) : Position{num_tiles, 0};
  __syncthreads();
  BlockPlan own;
  own.header = {num_tiles, sharing, 0, num_workers};
  own.range = {line.bounds[0].tile, line.bounds[0].block, line.bounds[1].tile, line.bounds[1].block};
  __syncthreads();
  return own;
}

}  // namespace flux::cuda
