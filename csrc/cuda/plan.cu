// Stage 2: lengths, routes and patterns to items of work. One block, one launch, nothing returned to the host.
#include <climits>

#include "cuda/cuda.h"
#include "cuda/launch.h"

namespace flux::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kSmall = 1024;  // problems of at most so many rows and tiles stay in shared memory

struct Shared {
  int64_t row_keys[kSmall];
  int64_t cost[kSmall + 1];
  int32_t tile_begin[2][kSmall + 1];
  int64_t warp_sums[kThreads / 32];
  unsigned long long total_cost, min_row_cost, max_row_cost;
  int32_t max_tile_cost;
};

// values[i] becomes the sum of those before it, values[n] the sum of all.
template <typename Int>
__device__ void exclusive_sum(Int* values, int32_t n, int64_t* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t carry = 0;
  for (int32_t first = 0; first < n; first += kThreads) {
    const int32_t i = first + int32_t(threadIdx.x);
    const int64_t own = i < n ? int64_t(values[i]) : 0;
    int64_t sum = own;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      int64_t s = warp_sums[lane];
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(~0u, s, step);
        if (lane >= step) s += other;
      }
      warp_sums[lane] = s;
    }
    __syncthreads();
    if (i < n) values[i] = Int(carry + (warp ? warp_sums[warp - 1] : 0) + sum - own);
    carry += warp_sums[kThreads / 32 - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) values[n] = Int(carry);
  __syncthreads();
}

// The row that a tile belongs to: the last with begin[row] <= tile that has any.
__device__ int32_t find_row(const int32_t* begin, int32_t rows, int32_t tile) {
  int32_t lo = 0, hi = rows;
  while (hi - lo > 1) {
    const int32_t mid = (lo + hi) / 2;
    (begin[mid] <= tile ? lo : hi) = mid;
  }
  return lo;
}

// Bitonic network; `n` is a power of two.
__device__ void sort(int64_t* keys, int32_t n) {
  for (int32_t size = 2; size <= n; size *= 2)
    for (int32_t step = size / 2; step > 0; step /= 2) {
      for (int32_t i = threadIdx.x; i < n / 2; i += kThreads) {
        const int32_t a = 2 * i - (i & (step - 1)), b = a + step;
        const bool ascending = (a & size) == 0;
        const int64_t x = keys[a], y = keys[b];
        if ((x > y) == ascending) keys[a] = y, keys[b] = x;
      }
      __syncthreads();
    }
}

// The tiles of a row stand from its last query block to its first.
__device__ Tile make_tile(const ProblemShape& s, int32_t row, int32_t count, int32_t index) {
  return {row / s.num_kv_heads, row % s.num_kv_heads, count - 1 - index};
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ ProblemShape s, const TileShape tile, const int32_t tiles_max,
                const int32_t num_workers, PlanView plan) {
  __shared__ Shared shared;
  let_next_start();
  const int32_t rows = s.batch * s.num_kv_heads, tid = threadIdx.x;
  const bool small_rows = rows <= kSmall;
  int64_t* row_keys = small_rows ? shared.row_keys : plan.row_keys;
  int32_t* begin = small_rows ? shared.tile_begin[0] : plan.tile_begin;
  int32_t* sorted_begin = small_rows ? shared.tile_begin[1] : plan.tile_begin + rows + 1;

  // Tiles of every row.
  for (int32_t r = tid; r < rows; r += kThreads) {
    begin[r] = tiles_in_row(s, tile, r / s.num_kv_heads, r % s.num_kv_heads);
    row_keys[r] = 0;  // for now its cost
  }
  if (tid == 0) {
    shared.total_cost = shared.max_row_cost = 0;
    shared.min_row_cost = ULLONG_MAX;
    shared.max_tile_cost = 0;
  }
  __syncthreads();
  exclusive_sum(begin, rows, shared.warp_sums);
  for (int32_t r = tid; r <= rows; r += kThreads) begin[r] = min_of(begin[r], tiles_max);
  __syncthreads();
  const int32_t num_tiles = begin[rows];
  int64_t* cost = num_tiles <= kSmall ? shared.cost : plan.cost;

  // Cost of every tile, row, and of all.
  int64_t thread_cost = 0;
  int32_t thread_max = 0;
  for (int32_t t = tid; t < num_tiles; t += kThreads) {
    const int32_t row = find_row(begin, rows, t);
    const Tile own = make_tile(s, row, begin[row + 1] - begin[row], t - begin[row]);
    const int32_t c = tile_cost(view_tile(s, tile, own));
    plan.tiles[t] = own;
    cost[t] = c;
    atomicAdd(reinterpret_cast<unsigned long long*>(&row_keys[row]), static_cast<unsigned long long>(c));
    thread_cost += c;
    thread_max = max_of(thread_max, c);
  }
  for (int step = 16; step > 0; step /= 2) {
    thread_cost += __shfl_xor_sync(~0u, thread_cost, step);
    thread_max = max_of(thread_max, __shfl_xor_sync(~0u, thread_max, step));
  }
  if (tid % 32 == 0) {
    atomicAdd(&shared.total_cost, static_cast<unsigned long long>(thread_cost));
    atomicMax(&shared.max_tile_cost, thread_max);
  }
  __syncthreads();

  const auto total_cost = int64_t(shared.total_cost);
  const bool whole = hand_out_whole(total_cost, shared.max_tile_cost, num_workers);
  const int32_t sharing = sharing_workers(total_cost, num_workers);
  if (tid == 0) *plan.header = {num_tiles, whole ? num_tiles : sharing, whole, num_workers};

  if (!whole) {
    exclusive_sum(cost, num_tiles, shared.warp_sums);
    for (int32_t w = tid; w < num_workers; w += kThreads)
      plan.ranges[w] = w < sharing ? work_range(cost, num_tiles, w, sharing) : WorkRange{num_tiles, 0, num_tiles, 0};
    return;
  }

  // Costliest rows first; nothing to do where all cost the same.
  for (int32_t r = tid; r < rows; r += kThreads) {
    atomicMin(&shared.min_row_cost, static_cast<unsigned long long>(row_keys[r]));
    atomicMax(&shared.max_row_cost, static_cast<unsigned long long>(row_keys[r]));
  }
  __syncthreads();
  if (shared.min_row_cost == shared.max_row_cost) return;
  int32_t padded = 1;
  while (padded < rows) padded *= 2;
  for (int32_t r = tid; r < padded; r += kThreads) row_keys[r] = r < rows ? row_key(row_keys[r], r) : LLONG_MAX;
  __syncthreads();
  sort(row_keys, padded);
  for (int32_t i = tid; i < rows; i += kThreads) {
    const int32_t row = row_of_key(row_keys[i]);
    sorted_begin[i] = begin[row + 1] - begin[row];
  }
  __syncthreads();
  exclusive_sum(sorted_begin, rows, shared.warp_sums);
  for (int32_t t = tid; t < num_tiles; t += kThreads) {
    const int32_t i = find_row(sorted_begin, rows, t);
    plan.tiles[t] = make_tile(s, row_of_key(row_keys[i]), sorted_begin[i + 1] - sorted_begin[i], t - sorted_begin[i]);
  }
}

}  // namespace

cudaError_t plan(const ProblemShape& s, const AttendConfig& c, const PlanView& plan, cudaStream_t stream) {
  plan_kernel<<<1, kThreads, 0, stream>>>(s, c.tile, int32_t(max_tiles(s, c.tile)), c.num_workers, plan);
  return cudaGetLastError();
}

}  // namespace flux::cuda
