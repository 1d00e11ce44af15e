// What a block needs to plan: scans, the way from a tile's number to the tile; and the plan of a small problem, which
// the blocks of the attend and combine kernels make for themselves (a launch less, which a decode step feels).
#pragma once

#include "cuda/worker.h"

namespace flux::cuda {

// The sum over the lanes up to this one.
template <typename Int>
__device__ Int sum_up_to_lane(Int x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Int other = __shfl_up_sync(~0u, x, step);
    if (int(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}

// values[i] becomes the sum of those before it, values[n] the sum of all, or the largest Int; any kThreads values
// that follow each other must sum to 31 bits.
template <int kThreads, typename Int>
__device__ void exclusive_sum(Int* values, int32_t n, int32_t* warp_sums) {
  constexpr int kWarps = kThreads / 32;
  constexpr int64_t kLargest = sizeof(Int) == 4 ? INT32_MAX : INT64_MAX;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t carry = 0;
  for (int32_t first = 0; first < n; first += kThreads) {
    const int32_t i = first + int32_t(threadIdx.x);
    const int32_t own = i < n ? int32_t(values[i]) : 0;
    const int32_t sum = sum_up_to_lane(own);
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

// The sequence head that a tile belongs to: the last with begin[seq_head] <= tile that has any.
__device__ inline int32_t find_seq_head(const int32_t* begin, int32_t seq_heads, int32_t tile) {
  int32_t lo = 0, hi = seq_heads;
  while (hi - lo > 1) {
    const int32_t mid = (lo + hi) / 2;
    (begin[mid] <= tile ? lo : hi) = mid;
  }
  return lo;
}

// The tiles of a sequence head stand from its last query block to its first.
__device__ inline Tile make_tile(const AttendParams& p, int32_t seq_head, int32_t count, int32_t index) {
  return {seq_head / p.kv.num_heads, seq_head % p.kv.num_heads, count - 1 - index};
}

// The line of work of a problem that plans_inline: tile t is that of sequence head t, which has no other.
struct InlineLine {
  int64_t begin[kInlineTiles + 1];  // cost of the tiles before each, as shared out; of all
  int32_t cost[kInlineTiles];
  int32_t workers;  // that have a share
};

__device__ inline Tile inline_tile(const AttendParams& p, int32_t t) {
  return {t / p.kv.num_heads, t % p.kv.num_heads, 0};
}

// Fills in, from the costs of the tiles, how many workers share them and on which unit of the line each tile begins; by
// one warp. Tiles are rounded up to whole shares where `tiles_differ`.
__device__ inline void share_out(InlineLine& line, int32_t num_tiles, int32_t num_workers) {
  const int32_t lane = threadIdx.x % 32, count = ceil_div(num_tiles, 32);
  const int32_t first = min_of(lane * count, num_tiles), last = min_of(first + count, num_tiles);
  int64_t own = 0;
  int32_t longest = 0;
#pragma unroll 1
  for (int32_t t = first; t < last; ++t) {
    own += line.cost[t];
    longest = max_of(longest, line.cost[t]);
  }
  const int64_t end = sum_up_to_lane(own), total = __shfl_sync(~0u, end, 31);
  int32_t workers = sharing_workers(total, num_tiles, num_workers);
  int64_t begin = end - own, share = 0;  // above 0: tiles are rounded up to whole shares
  longest = __reduce_max_sync(~0u, longest);
  if (!tiles_differ(int64_t(longest), total, num_tiles)) {
    workers = workers_for_alike<int64_t>(longest, total / workers, num_tiles, workers);
  } else {
    share = ceil_div_64(total, workers);
    int32_t own_shares = 0;
#pragma unroll 1
    for (int32_t t = first; t < last; ++t) own_shares += int32_t(whole_shares<int64_t>(line.cost[t], share));
    const int32_t shares_end = sum_up_to_lane(own_shares), shares = __shfl_sync(~0u, shares_end, 31);
    if (shares <= workers) {
      workers = shares;
      begin = (shares_end - own_shares) * share;
    } else {
      share = 0;
    }
  }
#pragma unroll 1
  for (int32_t t = first; t < last; ++t) {
    line.begin[t] = begin;
    begin += share > 0 ? whole_shares<int64_t>(line.cost[t], share) * share : line.cost[t];
  }
  if (lane == 31) {
    line.begin[num_tiles] = begin;
    line.workers = workers;
  }
}

// Fills the line, in shared memory, and returns how many tiles it has. Each is shown to keep(t, view) by one thread.
template <int kThreads, typename Keep>
__device__ int32_t line_up(const AttendParams& p, const TileShape& tile, int32_t num_workers, InlineLine& line,
                           Keep keep) {
  const int32_t num_tiles = p.batch * p.kv.num_heads;
  for (int32_t t = threadIdx.x; t < num_tiles; t += kThreads) {
    const TileView view = view_tile(p, tile, inline_tile(p, t));
    line.cost[t] = tile_cost(view);
    keep(t, view);
  }
  __syncthreads();
  if (threadIdx.x < 32) share_out(line, num_tiles, num_workers);
  __syncthreads();
  return num_tiles;
}

// The share of a worker; empty for those that share nothing.
__device__ inline WorkRange share_of(const InlineLine& line, int32_t num_tiles, int32_t worker) {
  if (worker >= line.workers) return {num_tiles, 0, num_tiles, 0};
  // Even lanes find where it begins, odd ones where it ends.
  const Position p = share_begin(line.begin, num_tiles, worker + int32_t(threadIdx.x % 2), line.workers);
  return {__shfl_sync(~0u, p.tile, 0), __shfl_sync(~0u, p.block, 0), __shfl_sync(~0u, p.tile, 1),
          __shfl_sync(~0u, p.block, 1)};
}

// The unit of a line that every warp has in registers: `end` is where the lane's tile ends.
__device__ inline Position position_of_warp(uint32_t end, int32_t num_tiles, uint32_t unit) {
  const bool before = int32_t(threadIdx.x % 32) < num_tiles && end <= unit;
  return position_in(__popc(__ballot_sync(~0u, before)), unit - __reduce_max_sync(~0u, before ? end : 0));
}

// share_out and share_of for a line so short that every warp has it in registers, a tile a lane. It stands beside them
// for speed: no barrier, no search, 32-bit divisions.
__device__ inline WorkRange share_of_warp(int32_t cost, int32_t num_tiles, int32_t worker, int32_t num_workers) {
  const int32_t lane = threadIdx.x % 32;
  uint32_t own = lane < num_tiles ? cost : 0;
  const uint32_t total = __reduce_add_sync(~0u, own);  // fits: a tile has 2^31 keys at most, a block 32 at least
  uint32_t workers = sharing_workers(total, num_tiles, num_workers);  // fewer than 2^16
  uint32_t share = total / workers, rest = total % workers;           // rest: units that make some shares larger
  const uint32_t longest = __reduce_max_sync(~0u, own);
  if (!tiles_differ(longest, total, num_tiles)) {
    if (const uint32_t fewer = workers_for_alike(longest, share, num_tiles, int32_t(workers)); fewer < workers)
      workers = fewer, share = total / fewer, rest = total % fewer;
  } else {
    const uint32_t largest = share + (rest > 0), own_shares = whole_shares(own, largest);
    if (const uint32_t shares = __reduce_add_sync(~0u, own_shares); shares <= workers) {
      own = own_shares * largest;
      workers = shares, share = largest, rest = 0;
    }
  }
  const uint32_t end = sum_up_to_lane(own);
  const auto position = [&](uint32_t w) {
    if (w > workers) w = workers;
    return position_of_warp(end, num_tiles, share * w + rest * w / workers);
  };
  const Position first = position(worker), last = position(worker + 1);
  return {first.tile, first.block, last.tile, last.block};
}

// The line of a prefill kernel that plans for itself (`plans_few`), a tile a lane of every warp. As the plan kernel
// does, it leaves tiles whole, gives them whole shares or cuts them evenly; a whole tile is one share.
struct FewTiles {
  uint32_t end;    // on which unit the lane's tile ends
  uint32_t total;  // units
  int32_t workers;

  __device__ WorkRange range(int32_t num_tiles, int32_t worker) const {
    if (worker >= workers) return {num_tiles, 0, num_tiles, 0};
    const uint32_t share = total / workers, rest = total % workers;
    const auto position = [&](uint32_t w) {  // share_unit with 32 bits
      return position_of_warp(end, num_tiles, share * w + rest * w / workers);
    };
    const Position first = position(worker), last = position(worker + 1);
    return {first.tile, first.block, last.tile, last.block};
  }
};
__device__ inline FewTiles line_up_few(int32_t cost, int32_t num_tiles, int32_t num_workers) {
  const bool valid = int32_t(threadIdx.x % 32) < num_tiles;
  uint32_t own = valid ? cost : 0;
  const uint32_t total = __reduce_add_sync(~0u, own), largest = __reduce_max_sync(~0u, own);
  const uint32_t smallest = ~__reduce_max_sync(~0u, valid ? ~own : 0);
  Cut<uint32_t> cut{largest, num_tiles};  // whole tiles
  if (num_tiles > num_workers || !waves_end_in_time(num_tiles, largest, total, num_workers))
    cut = cut_apart(total, smallest, largest, num_tiles, sharing_workers(total, num_tiles, num_workers),
                    [&](uint32_t share) { return __reduce_add_sync(~0u, whole_shares(own, share)); });
  const uint32_t end = sum_up_to_lane(whole_shares(own, cut.unit) * cut.unit);
  return {end, __shfl_sync(~0u, end, 31), cut.num_workers};
}

// The pieces of a tile, found by a warp among the ranges of the workers from `first` on; count 0: it is whole.
__device__ inline TilePieces pieces_of(const WorkRange* ranges, int32_t first, int32_t num_workers, int32_t tile) {
  constexpr int kAtOnce = 5;  // loads of a lane under way: all ranges of 160 workers
  int32_t count = 0;
  uint32_t slot = ~0u;  // of the lane's first piece
  for (; first < num_workers; first += 32 * kAtOnce) {
    const auto worker_of_lane = [&](int i) { return first + 32 * i + int32_t(threadIdx.x % 32); };
    uint4 own[kAtOnce];  // a range is loaded as one
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      own[i] = worker_of_lane(i) < num_workers ? reinterpret_cast<const uint4*>(ranges)[worker_of_lane(i)] : uint4{};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const WorkRange range{int32_t(own[i].x), int32_t(own[i].y), int32_t(own[i].z), int32_t(own[i].w)};
      // Does one of its ends lie inside the tile?
      const bool has = (range.tile == tile && range.block > 0) || (range.end_tile == tile && range.end_block > 0);
      count += has;
      slot = min(slot, has ? uint32_t(partial_slot(range, worker_of_lane(i), tile)) : ~0u);
    }
  }
  slot = ~__reduce_max_sync(~0u, ~slot);
  return {__reduce_add_sync(~0u, count), int32_t(slot / 2), int32_t(slot)};
}

// A tile by its number. Every sequence head has as many as the longest: those past the end of a shorter one are empty.
__device__ inline TileView view_in_order(const AttendParams& p, const TileShape& tile, TileOrder order,
                                         int32_t tiles_each, int32_t t) {
  TileView view = view_tile(p, tile, tile_at(order, t, p.batch * p.kv.num_heads, p.kv.num_heads, tiles_each));
  view.q_rows.end = max_of(view.q_rows.end, view.q_rows.begin);
  return view;
}

}  // namespace flux::cuda
