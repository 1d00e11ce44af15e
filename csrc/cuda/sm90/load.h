// The producer warps: one walks the plan, one feeds shared memory through TMA.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/dependent_launch.h"
#include "cuda/plan.h"
#include "cuda/sm90/epilogue.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/traits.h"

namespace flux::cuda::sm90 {

// Publishes the pieces of this thread block ahead of their use, so that finding one hides behind computing another; but
// takes a tile that another thread block could do only when the TMA thread asks for it. Writes the rows of tiles that
// see no key itself. Called by a whole warp, all of whose lanes wait on the barriers: if one waited alone while the
// others stood at __syncwarp, it would spin, and take a seventh of the issue slots of the warps beside it.
template <class T>
CUTLASS_DEVICE void schedule(const KernelParams& p, typename T::Shared& shared) {
  const bool leader = cutlass::canonical_lane_idx() == 0;
  Ring<T::kWorkSlots> ring;
  Ring<1> wanted;
  const auto publish = [&](const Piece& piece) {
    shared.work_empty[ring.index].wait(ring.phase ^ 1);
    if (leader) {
      shared.work[ring.index] = piece;
      shared.staged[ring.index] = leaves_staged<T>(p, piece);
      shared.work_full[ring.index].arrive();
    }
    __syncwarp();  // no lane lags so far behind that it misses a phase
    ring.advance();
  };
  constexpr bool kSpare = has_spare_registers(T::kHeadDim, T::kRows);
  if constexpr (kSpare) touch(p);
  wait_for_previous();
  let_next_start();
  const bool planned = p.order == TileOrder::kPlanned;
  const TileShape shape{p.tile.q_tokens, kSpare ? T::kKvBlock : p.tile.kv_block};  // a constant spares divisions
  const auto view_of = [&](int32_t t) {
    if constexpr (kSpare)
      if (p.inline_plan) return view_in_order(p.attend, shape, p.order, p.tiles_each, t);
    const int32_t heads = p.attend.kv.num_heads;
    const Tile tile = planned ? p.plan.tiles[t] : tile_at(p.order, t, p.attend.batch * heads, heads, p.tiles_each);
    return view_tile(p.attend, shape, tile);
  };
  const auto whole_tile = [](int32_t item) { return WorkRange{item, 0, item + 1, 0}; };
  PlanHeader header{p.num_tiles, p.num_tiles, 1, 0};
  WorkRange range = whole_tile(blockIdx.x);
  if (kSpare && p.inline_plan) {
    const int32_t lane = cutlass::canonical_lane_idx();
    const int32_t cost = lane < p.num_tiles ? tile_cost(view_of(lane)) : 0;
    header = {p.num_tiles, int32_t(gridDim.x), 0, 0};
    range = line_up_few(cost, p.num_tiles, int32_t(gridDim.x)).range(p.num_tiles, int32_t(blockIdx.x));
    if (leader) p.plan.ranges[blockIdx.x] = range;  // for combine
  } else if (planned) {
    header = *p.plan.header;
    range = first_range(p.plan, header);
  }
  int32_t wave = 0;
  for (int32_t item = blockIdx.x; item < header.num_items;
       range = header.whole_tiles ? whole_tile(item) : item_range(p.plan, item)) {
    for (int32_t t = range.tile; t < tiles_end(range); ++t) {
      const Piece piece = piece_of(view_of(t), range, item, t);
      if (piece.span.begin < piece.span.end) {
        publish(piece);
        if (!header.whole_tiles) continue;
        shared.work_wanted.wait(wanted.phase);
        wanted.advance();
      } else {
        store_empty<T>(p.attend, piece.view);
      }
    }
    if (!header.whole_tiles || header.num_items <= int32_t(gridDim.x)) break;  // one item per thread block
    item = kSpare && p.uncounted ? item_uncounted(int32_t(blockIdx.x), ++wave, int32_t(gridDim.x))
                                 : __shfl_sync(~0u, leader ? take_item(p.plan) : 0, 0);
    if (item >= header.num_items) break;
  }
  Piece end;
  end.view.tile.seq = -1;
  publish(end);
}

// Feeds Q, K and V of every tile. Called by one thread.
//
// From the last key block (the diagonal) to the first; the order in the ring is K0, K1, V0, K2, V1, ...: V comes one
// block behind K, as the consumers use it, across the end of a tile too. Before the last V of all stands an empty
// buffer: the consumers need not ask whether there is a next K.
template <class T>
class Loader {
 public:
  CUTLASS_DEVICE Loader(const KernelParams& p, typename T::Shared& shared) : p_(p), shared_(shared) {}

  CUTLASS_DEVICE void run() {
    prefetch(p_.q_map);
    prefetch(p_.k_map);
    prefetch(p_.v_map);
    if constexpr (T::kStagesOutput) prefetch(p_.out_map);
    wait_for_previous();
    Keys last;           // where the V that is still to be loaded lies
    int32_t block = -1;  // its block; none at first
    for (Ring<T::kWorkSlots> ring;; ring.advance()) {
      shared_.work_full[ring.index].wait(ring.phase);
      const typename T::Work& piece = shared_.work[ring.index];
      if (piece.view.tile.seq < 0) break;
      const Keys keys(p_.attend, piece.view);
      const auto mask = piece.view.mask();
      const Hidden hidden = piece.view.hides_only_later_keys() ? Hidden::kLater : Hidden::kAny;
      const int32_t asks_at = min_of(piece.span.begin + T::kBlocksAhead, piece.span.end) - 1;
      for (int32_t i = piece.span.end - 1; i >= piece.span.begin; --i) {
        if (i == asks_at) shared_.work_wanted.arrive();
        const int32_t next = piece.view.blocks[i], begin = next * T::kKvBlock;
        if (i == piece.span.end - 1) shared_.past[ring.index] = begin + T::kKvBlock - keys.count;
        shared_.kv_empty[ring_.index].wait(ring_.phase ^ 1);
        shared_.info[ring_.index] = {begin, mask(begin, begin + T::kKvBlock) ? hidden : Hidden::kNone};
        load_block(p_.k_map, p_.attend.kv.k.stride, keys, next);
        if (block >= 0) load_v(last, block);
        // Behind V: the consumers wait for V before they are done with the Q whose place this one may take.
        if (i == piece.span.end - 1) load_q(piece.view);
        block = next;
        last = keys;
      }
      shared_.work_empty[ring.index].arrive();
    }
    if (block < 0) return;
    skip_block();
    load_v(last, block);
  }

 private:
  // The keys of a sequence and KV head.
  struct Keys {
    const int32_t* pages = nullptr;
    int32_t seq = 0, head = 0, first_row = 0, count = 0;
    Keys() = default;
    CUTLASS_DEVICE Keys(const AttendParams& a, const TileView& v)
        : seq(v.tile.seq), head(v.tile.kv_head), first_row(v.kv_rows.begin), count(v.kv_rows.size()) {
      if (a.kv.page_table) {
        pages = a.kv.page_table + seq * a.kv.page_stride_b + head * a.kv.page_stride_h;
        if (a.kv.pages_per_head) head = 0;
      }
    }
  };

  CUTLASS_DEVICE static void prefetch(const CUtensorMap& map) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
  }

  CUTLASS_DEVICE void load_q(const TileView& view) {
    const int i = q_ring_.index;
    shared_.q_empty[i].wait(q_ring_.phase ^ 1);
    const int32_t group = p_.group;
    Barrier& full = shared_.q_full[i];
    full.arrive_and_expect(uint32_t(p_.tile.q_tokens * group * T::kHeadDim * sizeof(typename T::Element)));
    const int32_t seq = p_.attend.q.stride.b == 0 ? 0 : view.tile.seq;
    CUTE_UNROLL
    for (int32_t s = 0; s < T::kSlabs; ++s)
      cute::SM90_TMA_LOAD_4D::copy(&p_.q_map, full.pointer(), kStreamHint,
                                   shared_.q + i * T::kQElements + s * T::kRows * T::kSlab, s * T::kSlab,
                                   view.tile.kv_head * group, view.q_rows.begin, seq);
    q_ring_.advance();
  }

  CUTLASS_DEVICE void load_v(const Keys& keys, int32_t block) {
    shared_.kv_empty[ring_.index].wait(ring_.phase ^ 1);
    load_block(p_.v_map, p_.attend.kv.v.stride, keys, block);
  }

  CUTLASS_DEVICE void skip_block() {
    shared_.kv_empty[ring_.index].wait(ring_.phase ^ 1);
    shared_.kv_full[ring_.index].arrive();
    ring_.advance();
  }

  // Fills the next buffer, which is empty.
  CUTLASS_DEVICE void load_block(const CUtensorMap& map, const Strides& stride, const Keys& keys, int32_t block) {
    Barrier& full = shared_.kv_full[ring_.index];
    typename T::Element* buffer = shared_.kv + ring_.index * T::kBufferElements;
    ring_.advance();
    full.arrive_and_expect(T::kBufferElements * sizeof(typename T::Element));
    const int32_t begin = block * T::kKvBlock;
    if (!keys.pages) {
      load_rows(map, full, buffer, keys.first_row + begin, keys.head, stride.b == 0 ? 0 : keys.seq);
      return;
    }
    const int32_t page_size = p_.attend.kv.page_size;
    for (int32_t r = 0; r < T::kKvBlock; r += p_.kv_box_rows) {
      const int32_t pos = begin + r, page = pos / page_size;
      // Beyond the sequence the table holds anything: page -1 lies outside the tensor, which TMA fills with zeros.
      load_rows(map, full, buffer + r * T::kSlab, pos - page * page_size, keys.head,
                uint32_t(pos) < uint32_t(keys.count) ? keys.pages[page] : -1);
    }
  }

  CUTLASS_DEVICE void load_rows(const CUtensorMap& map, Barrier& full, typename T::Element* target, int32_t row,
                                int32_t head, int32_t batch) {
    CUTE_UNROLL
    for (int32_t s = 0; s < T::kSlabs; ++s)
      cute::SM90_TMA_LOAD_4D::copy(&map, full.pointer(), kKvHint, target + s * T::kKvBlock * T::kSlab, s * T::kSlab,
                                   row, head, batch);
  }

  // One warpgroup's tile holds all queries of a sequence head, so its keys and values are read once, as queries are.
  static constexpr auto kStreamHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_FIRST);
  static constexpr auto kKvHint = T::kWarpgroups == 1 ? kStreamHint : uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  const KernelParams& p_;
  typename T::Shared& shared_;
  Ring<T::kBuffers> ring_;
  Ring<T::kQStages> q_ring_;
};

}  // namespace flux::cuda::sm90
