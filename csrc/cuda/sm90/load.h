// The producer warps: one walks the plan, one feeds shared memory through TMA.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/sm90/params.h"
#include "cuda/sm90/traits.h"

namespace flux::cuda::sm90 {

// Publishes the tiles of this thread block, kWorkSlots ahead, so that finding a tile hides behind computing another.
// Called by one thread.
template <class T>
CUTLASS_DEVICE void schedule(const KernelParams& p, typename T::Shared& shared) {
  Ring<T::kWorkSlots> ring;
  const auto publish = [&](const Piece& piece) {
    shared.work_empty[ring.index].wait(ring.phase ^ 1);
    shared.work[ring.index] = piece;
    shared.work_full[ring.index].arrive();
    ring.advance();
  };
  const int32_t num_items = p.plan.header->num_items;
  for (int32_t item = blockIdx.x; item < num_items; item = take_item(p.plan)) {
    const WorkRange range = item_range(p.plan, item);
    for (int32_t t = range.tile; t < tiles_end(range); ++t)
      publish(piece_of(p.plan, p.attend.shape, p.tile, range, item, t));
  }
  Piece end;
  end.view.tile.seq = -1;
  publish(end);
}

// Feeds Q, K and V of every tile. Called by one thread.
template <class T>
class Loader {
 public:
  CUTLASS_DEVICE Loader(const KernelParams& p, typename T::Shared& shared) : p_(p), shared_(shared) {}

  CUTLASS_DEVICE void run() {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p_.q_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p_.k_map));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p_.v_map));
    for (Ring<T::kWorkSlots> ring;; ring.advance()) {
      shared_.work_full[ring.index].wait(ring.phase);
      const TileView view = shared_.work[ring.index].view;
      const TileSpan span = shared_.work[ring.index].span;
      shared_.work_empty[ring.index].arrive();
      if (view.tile.seq < 0) return;
      if (span.begin < span.end) load_tile(view, span);
    }
  }

 private:
  // From the last key block (the diagonal) to the first. V comes one block behind K, as the consumers use it.
  CUTLASS_DEVICE void load_tile(const TileView& view, const TileSpan& span) {
    int32_t block = view.blocks[span.end - 1];
    load_k(view, block);
    load_q(view);
    for (int32_t i = span.end - 2; i >= span.begin; --i) {
      const int32_t next = view.blocks[i];
      load_k(view, next);
      load_v(view, block);
      block = next;
    }
    load_v(view, block);
  }

  CUTLASS_DEVICE void load_q(const TileView& view) {
    shared_.q_empty.wait(q_phase_ ^ 1);
    q_phase_ ^= 1;
    const int32_t group = p_.attend.shape.group();
    shared_.q_full.arrive_and_expect_tx(uint32_t(p_.tile.q_tokens * group * T::kHeadDim * sizeof(typename T::Element)));
    const int32_t seq = p_.attend.q_stride.b == 0 ? 0 : view.tile.seq;
    CUTE_UNROLL
    for (int32_t s = 0; s < T::kSlabs; ++s)
      cute::SM90_TMA_LOAD_4D::copy(&p_.q_map, reinterpret_cast<uint64_t*>(&shared_.q_full), kStreamHint,
                                   shared_.q + s * T::kRows * T::kSlab, s * T::kSlab, view.tile.kv_head * group,
                                   view.q_rows.begin, seq);
  }

  CUTLASS_DEVICE void load_k(const TileView& view, int32_t block) {
    const int i = k_ring_.index;
    shared_.k_empty[i].wait(k_ring_.phase ^ 1);
    const int32_t begin = block * T::kKvBlock;
    shared_.info[i] = {begin, view.masked(begin, begin + T::kKvBlock)};
    load_block(p_.k_map, p_.attend.k_stride, view, begin, shared_.k_full[i], shared_.k + i * T::kStageElements);
    k_ring_.advance();
  }

  CUTLASS_DEVICE void load_v(const TileView& view, int32_t block) {
    const int i = v_ring_.index;
    shared_.v_empty[i].wait(v_ring_.phase ^ 1);
    load_block(p_.v_map, p_.attend.v_stride, view, block * T::kKvBlock, shared_.v_full[i],
               shared_.v + i * T::kStageElements);
    v_ring_.advance();
  }

  // The kKvBlock keys from `begin` on, counted from the first key of the sequence.
  CUTLASS_DEVICE void load_block(const CUtensorMap& map, const Strides& stride, const TileView& view, int32_t begin,
                                 typename T::TmaBarrier& full, typename T::Element* stage) {
    full.arrive_and_expect_tx(T::kStageElements * sizeof(typename T::Element));
    const AttendParams& a = p_.attend;
    if (!a.page_table) {
      const int32_t seq = stride.b == 0 ? 0 : view.tile.seq;
      load_rows(map, full, stage, view.kv_rows.begin + begin, view.tile.kv_head, seq);
      return;
    }
    const int32_t* pages = a.page_table + view.tile.seq * a.page_stride_b + view.tile.kv_head * a.page_stride_h;
    const int32_t head = a.page_stride_h ? 0 : view.tile.kv_head;
    for (int32_t r = 0; r < T::kKvBlock; r += p_.kv_box_rows) {
      const int32_t pos = begin + r;
      // Beyond the sequence the table holds anything: page -1 lies outside the tensor, which TMA fills with zeros.
      const int32_t page = pos < view.kv_rows.size() ? pages[pos / a.page_size] : -1;
      load_rows(map, full, stage + r * T::kSlab, pos % a.page_size, head, page);
    }
  }

  CUTLASS_DEVICE void load_rows(const CUtensorMap& map, typename T::TmaBarrier& full, typename T::Element* target,
                                int32_t row, int32_t head, int32_t batch) {
    CUTE_UNROLL
    for (int32_t s = 0; s < T::kSlabs; ++s)
      cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), kReuseHint,
                                   target + s * T::kKvBlock * T::kSlab, s * T::kSlab, row, head, batch);
  }

  static constexpr auto kStreamHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_FIRST);
  static constexpr auto kReuseHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  const KernelParams& p_;
  typename T::Shared& shared_;
  Ring<T::kStages> k_ring_, v_ring_;
  uint32_t q_phase_ = 0;
};

}  // namespace flux::cuda::sm90
