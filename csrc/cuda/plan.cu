// Stage 2: lengths, routes and patterns to items of work. One block, one launch, nothing returned to the host.
#include <climits>

#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"
#include "cuda/plan.h"

namespace flux::cuda {
namespace {

constexpr int kSmallSeqHeads = 1024, kSmallTiles = 2048;  // up to so many stay in shared memory
constexpr int kFewThreads = 256, kManyThreads = 1024;

struct Shared {
  int64_t sort_keys[kSmallSeqHeads];
  int64_t cost[kSmallTiles + 1];
  int32_t tile_begin[2][kSmallSeqHeads + 1];
  int32_t warp_sums[32];
  int32_t any_late;
  int32_t costs_differ;
  int32_t uneven, no_turns, perhaps_late;  // uneven: not all sequence heads have as many tiles
  int32_t largest_cost, minus_smallest_cost;
  int32_t largest_turn, minus_smallest_turn;
};

// The cost of the tiles with this place in their sequence heads.
__device__ int32_t turn_cost(const int64_t* cost, int32_t num_seq_heads, int32_t tiles_each, int32_t place) {
  int64_t sum = 0;
  for (int32_t n = 0; n < num_seq_heads; ++n) {
    const int64_t* own = cost + n * tiles_each + place;
    sum += own[1] - own[0];
  }
  return int32_t(sum);
}

// Bitonic network; `n` is a power of two.
template <int kThreads>
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

template <int kThreads>
__global__ void __launch_bounds__(kThreads, kManyThreads / kThreads)  // as few registers, however many threads
    plan_kernel(const __grid_constant__ AttendParams p, const TileShape tile, const int32_t tiles_max,
                const int32_t num_workers, PlanView plan) {
  __shared__ Shared shared;
  wait_for_previous();
  let_next_start();
  const int32_t seq_heads = p.batch * p.kv.num_heads, tid = threadIdx.x;
  const bool small = seq_heads <= kSmallSeqHeads;
  int64_t* sort_keys = small ? shared.sort_keys : plan.sort_keys;
  int32_t* begin = small ? shared.tile_begin[0] : plan.tile_begin;
  int32_t* sorted_begin = small ? shared.tile_begin[1] : plan.tile_begin + seq_heads + 1;

  // Tiles of every sequence head.
  for (int32_t n = tid; n < seq_heads; n += kThreads)
    begin[n] = min_of(tiles_in_seq_head(p, tile, n / p.kv.num_heads, n % p.kv.num_heads), kMaxSeqHeadTiles);
  if (tid == 0)
    shared.any_late = shared.costs_differ = shared.uneven = shared.no_turns = shared.perhaps_late = 0,
    shared.largest_cost = shared.largest_turn = 0, shared.minus_smallest_cost = shared.minus_smallest_turn = INT_MIN;
  __syncthreads();
  exclusive_sum<kThreads>(begin, seq_heads, shared.warp_sums);
  if (begin[seq_heads] > tiles_max) {  // only spans that overlap make so many
    __syncthreads();
    for (int32_t n = tid; n <= seq_heads; n += kThreads) begin[n] = min_of(begin[n], tiles_max);
    __syncthreads();
  }
  const int32_t num_tiles = begin[seq_heads], tiles_each = begin[1];
  for (int32_t n = tid; n < seq_heads; n += kThreads) {
    const int32_t longest_kv = p.kv.rows(n / p.kv.num_heads, n % p.kv.num_heads).size();
    if (begin[n + 1] - begin[n] != tiles_each) shared.uneven = 1;
    if (!takes_turns(seq_heads, longest_kv, p.head_dim)) shared.no_turns = 1;
  }
  int64_t* cost = num_tiles <= kSmallTiles ? shared.cost : plan.cost;

  // Cost of every tile, and of all before it.
  int32_t largest_cost = 0, minus_smallest_cost = INT_MIN;
  for (int32_t t = tid; t < num_tiles; t += kThreads) {
    const int32_t seq_head = find_seq_head(begin, seq_heads, t);
    const Tile own = make_tile(p, seq_head, begin[seq_head + 1] - begin[seq_head], t - begin[seq_head]);
    plan.tiles[t] = own;
    const int32_t own_cost = tile_cost(view_tile(p, tile, own));
    cost[t] = own_cost;
    largest_cost = max_of(largest_cost, own_cost);
    minus_smallest_cost = max_of(minus_smallest_cost, -own_cost);
  }
  largest_cost = __reduce_max_sync(~0u, largest_cost);
  minus_smallest_cost = __reduce_max_sync(~0u, minus_smallest_cost);
  if (tid % 32 == 0) {
    atomicMax(&shared.largest_cost, largest_cost);
    atomicMax(&shared.minus_smallest_cost, minus_smallest_cost);
  }
  __syncthreads();
  exclusive_sum<kThreads>(cost, num_tiles, shared.warp_sums);

  const int64_t total = cost[num_tiles];
  const bool even = !shared.uneven, in_turn = even && !shared.no_turns;
  largest_cost = shared.largest_cost;
  if (waves_end_in_time(num_tiles, largest_cost, total, num_workers)) {
    // Whole tiles, in any order.
  } else if (in_turn) {
    for (int32_t t = tid; t < num_tiles; t += kThreads)
      if (ends_late(total, cost[t + 1] - cost[t], total, num_workers)) shared.perhaps_late = 1;  // behind all others
    __syncthreads();
    for (int32_t i = tid; i < tiles_each && shared.perhaps_late; i += kThreads) {
      const Turn turn = turn_of(cost, seq_heads, tiles_each, i);
      if (ends_late(turn.before, turn.largest, total, num_workers)) shared.any_late = 1;
    }
  } else {
    for (int32_t t = tid; t < num_tiles; t += kThreads) {
      const int64_t own = cost[t + 1] - cost[t];
      if (is_small_part(own, total, num_workers)) continue;  // spares the search
      const int32_t seq_head = find_seq_head(begin, seq_heads, t);
      const int64_t before = work_before(cost, num_tiles, t, {begin[seq_head], begin[seq_head + 1]});
      if (ends_late(before, own, total, num_workers)) shared.any_late = 1;
    }
  }
  __syncthreads();
  const bool whole = !shared.any_late;
  int32_t sharing = sharing_workers(total, num_tiles, num_workers);
  if (!whole && num_tiles <= kThreads && total <= INT_MAX / 2) {  // 32 bits; longer lines are cut evenly
    const auto shares_of = [&](uint32_t share) {
      uint32_t shares = 0;
      for (int32_t t = tid % 32; t < num_tiles; t += 32) shares += whole_shares(uint32_t(cost[t + 1] - cost[t]), share);
      return __reduce_add_sync(~0u, shares);
    };
    const Cut<uint32_t> cut =
        cut_apart<uint32_t>(uint32_t(total), -shared.minus_smallest_cost, largest_cost, num_tiles, sharing, shares_of);
    // From now on costs are those shared out.
    const auto share_out = [&](uint32_t own) {
      __syncthreads();
      if (tid < num_tiles) cost[tid] = own;
      __syncthreads();
      exclusive_sum<kThreads>(cost, num_tiles, shared.warp_sums);
    };
    if (cut.unit > 1) {
      share_out(tid < num_tiles ? whole_shares(uint32_t(cost[tid + 1] - cost[tid]), cut.unit) * cut.unit : 0);
      sharing = cut.num_workers;
    } else if (even) {
      if (tid < tiles_each) {
        const int32_t turn = turn_cost(cost, seq_heads, tiles_each, tid);
        atomicMax(&shared.largest_turn, turn);
        atomicMax(&shared.minus_smallest_turn, -turn);
      }
      __syncthreads();
      const Cut<uint32_t> turns = cut_turns_apart<uint32_t>(uint32_t(total), -shared.minus_smallest_turn,
                                                            shared.largest_turn, tiles_each, sharing);
      if (turns.unit > 1) {
        uint32_t own = 0;
        if (tid < num_tiles) {
          const int32_t seq_head = tid % seq_heads, place = tid / seq_heads;
          const int64_t* first = cost + seq_head * tiles_each + place;
          own = uint32_t(first[1] - first[0]);
          if (seq_head == seq_heads - 1) own += turns.unit - turn_cost(cost, seq_heads, tiles_each, place);
          plan.tiles[tid] = tile_at(TileOrder::kInTurn, tid, seq_heads, p.kv.num_heads, tiles_each);
        }
        share_out(own);
        sharing = turns.num_workers;
      }
    }
  }
  if (tid == 0) *plan.header = {num_tiles, whole ? num_tiles : sharing, whole, 0};
  // Written where tiles are whole too: blocks ask for their first range and for the header at once.
  for (int32_t w = tid; w < num_workers; w += kThreads)
    plan.ranges[w] =
        !whole && w < sharing ? work_range(cost, num_tiles, w, sharing) : WorkRange{num_tiles, 0, num_tiles, 0};
  if (!whole) return;
  if (in_turn) {
    for (int32_t t = tid; t < num_tiles; t += kThreads)
      plan.tiles[t] = tile_at(TileOrder::kInTurn, t, seq_heads, p.kv.num_heads, tiles_each);
    return;
  }

  // Costliest sequence heads first; nothing to do where all cost the same.
  const int64_t first_cost = cost[begin[1]];
  int32_t padded = 1;
  while (padded < seq_heads) padded *= 2;
  for (int32_t n = tid; n < padded; n += kThreads) {
    const int64_t own_cost = n < seq_heads ? cost[begin[n + 1]] - cost[begin[n]] : 0;
    sort_keys[n] = n < seq_heads ? sort_key(own_cost, n) : LLONG_MAX;
    if (n < seq_heads && own_cost != first_cost) shared.costs_differ = 1;
  }
  __syncthreads();
  if (!shared.costs_differ) return;
  sort<kThreads>(sort_keys, padded);
  for (int32_t i = tid; i < seq_heads; i += kThreads) {
    const int32_t seq_head = seq_head_of(sort_keys[i]);
    sorted_begin[i] = begin[seq_head + 1] - begin[seq_head];
  }
  __syncthreads();
  exclusive_sum<kThreads>(sorted_begin, seq_heads, shared.warp_sums);
  for (int32_t t = tid; t < num_tiles; t += kThreads) {
    const int32_t i = find_seq_head(sorted_begin, seq_heads, t);
    plan.tiles[t] = make_tile(p, seq_head_of(sort_keys[i]), sorted_begin[i + 1] - sorted_begin[i], t - sorted_begin[i]);
  }
}

// The kernel after it reads nothing before its own wait, so it may start at once.
__global__ void clear_kernel(int32_t* next_item) {
  let_next_start();
  wait_for_previous();
  *next_item = 0;
}

}  // namespace

cudaError_t clear_counter(int32_t* next_item, bool overlap, cudaStream_t stream) {
  return launch(clear_kernel, 1, 1, 0, stream, overlap, next_item);
}

cudaError_t plan(const AttendParams& p, const AttendConfig& c, const PlanView& plan, cudaStream_t stream) {
  if (c.inline_plan) return cudaSuccess;
  if (c.order != TileOrder::kPlanned) {
    // Nobody counts where no block takes a second tile either.
    if (c.uncounted || max_tiles(p, c.tile) <= c.num_workers) return cudaSuccess;
    return clear_counter(&plan.header->next_item, c.overlap, stream);
  }
  const auto tiles = int32_t(max_tiles(p, c.tile));
  const bool few = tiles <= kFewThreads && num_seq_heads(p) <= kFewThreads;
  return launch(few ? plan_kernel<kFewThreads> : plan_kernel<kManyThreads>, 1, few ? kFewThreads : kManyThreads, 0,
                stream, c.overlap, p, c.tile, tiles, c.num_workers, plan);
}

}  // namespace flux::cuda
