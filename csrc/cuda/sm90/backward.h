// The gradients on Hopper; see cuda/backward.h. The products are WGMMA's; tiles come by cp.async, which reads rows of
// any layout and group as sm80's kernels do, into the layout that TMA would write (Traits, traits.h).
//
// Two warpgroups own 64 rows or keys each. While one works out P and dS, the other's products run.
#pragma once

#include <cutlass/arch/barrier.h>

#include "cuda/backward.h"
#include "cuda/sm90/epilogue.h"
#include "cuda/sm90/mainloop.h"

namespace flux::cuda::sm90 {

// A tile in shared memory as slabs of kSlab columns, rows of 128 (or 64) bytes, swizzled.
template <int kDim, int kRows>
struct SlabTile {
  static constexpr int kChunks = kDim / 8, kSlabChunks = kDim % 64 == 0 ? 8 : 4;  // of 16 bytes
  uint32_t base;

  static CUTLASS_DEVICE uint32_t offset(int row, int chunk) {
    const int phase = kSlabChunks == 8 ? row & 7 : (row >> 1) & 3;
    return 16 * ((chunk / kSlabChunks * kRows + row) * kSlabChunks + (chunk % kSlabChunks ^ phase));
  }
};

template <class Element_, int kHeadDim_, int kVisited_, int kStages_>
struct BackwardTraits {
  using Element = Element_;
  using T = std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;  // the same bits
  static constexpr int kHeadDim = kHeadDim_, kVisited = kVisited_, kStages = kStages_;
  static constexpr int kOwned = 128, kThreads = 256, kMinBlocks = 1;

  using Shapes = Traits<Element, kHeadDim, 2, 64>;  // for its atoms
  using LayoutOwned =
      decltype(tile_to_shape(typename Shapes::template Atom<Major::K>{}, Shape<Int<kOwned>, Int<kHeadDim>>{}));
  using LayoutVisited = decltype(tile_to_shape(typename Shapes::template Atom<Major::K>{},
                                               Shape<Int<kVisited>, Int<kHeadDim>, Int<kStages>>{}));
  // As the second products read it: [D, visited].
  using LayoutTransposed =
      decltype(tile_to_shape(typename Shapes::template Atom<Major::MN>{},
                             Shape<Int<kHeadDim>, Int<kVisited>, Int<kStages>>{}, Step<_2, _1, _3>{}));
  using WarpgroupLayout = Layout<Shape<_2, _1, _1>>;
  // S and dP, of what is owned and visited; dQ, dK and dV, of P or dS in registers.
  using MmaIn = decltype(make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, Shape<Int<kOwned>, Int<kVisited>, Int<kHeadDim>>, Major::K,
                                 Major::K>(),
      WarpgroupLayout{}));
  using MmaOut = decltype(make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, Shape<Int<kOwned>, Int<kHeadDim>, Int<kVisited>>, Major::K,
                                 Major::MN>(),
      WarpgroupLayout{}));

  using OwnedTile = SlabTile<kHeadDim, kOwned>;
  using VisitedTile = SlabTile<kHeadDim, kVisited>;
  static constexpr int kOwnedElements = kOwned * kHeadDim, kVisitedElements = kVisited * kHeadDim;

  struct Shared {
    alignas(1024) Element owned[2][kOwnedElements];
    alignas(1024) Element visited[2][kStages * kVisitedElements];
    VisitedRows<kVisited> rows[kStages];
  };
  static constexpr int kSmemBytes = int(sizeof(Shared)) + 1024;  // so that it can begin at a multiple of 1024
  static_assert(kSmemBytes <= kSharedCapacity - kSharedRest);

  static CUTLASS_DEVICE Shared& shared() {
    const auto begin = reinterpret_cast<uintptr_t>(sm80::shared_memory());
    return *reinterpret_cast<Shared*>((begin + 1023) / 1024 * 1024);
  }
  static CUTLASS_DEVICE OwnedTile owned(int i) { return {sm80::shared_address(shared().owned[i])}; }
  static CUTLASS_DEVICE VisitedTile visited(int stage, int i) {
    return {sm80::shared_address(shared().visited[i] + stage * kVisitedElements)};
  }

  // Results of the first products as the left operand of the second ones.
  static CUTLASS_DEVICE auto make_left() {
    return cute::make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kVisited / 16>>>{});
  }
  template <class Left, class Products>
  static CUTLASS_DEVICE void round(Left& left, const Products& from) {
    using Convert = cutlass::NumericArrayConverter<Element, float, decltype(size(from))::value>;
    *reinterpret_cast<typename Convert::result_type*>(left.data()) =
        Convert{}(*reinterpret_cast<const typename Convert::source_type*>(from.data()));
  }

  // What this thread copied is there for the products of all; and all are done with what comes before.
  template <int kPending>
  static CUTLASS_DEVICE void await_tile() {
    sm80::cp_async_wait<kPending>();
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
  }

  // Columns 8 j + 2 (lane % 4) + {0, 1} of row r of this thread's two go to `row_of(r)`; null: nowhere.
  template <class Output, class RowOf>
  static CUTLASS_DEVICE void store_rows(const Output& out, float factor, int32_t head_dim, RowOf row_of) {
    const int32_t lane = int32_t(threadIdx.x % 4);
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      T* to = row_of(thread_row(int(threadIdx.x / 128), r));
      CUTE_UNROLL
      for (int j = 0; j < kHeadDim / 8; j += 4) {
        uint32_t word[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (j + i) + 2 * r;
          word[i] = pack<T>(out(at) * factor, out(at + 1) * factor);
        }
        const uint4 chunk = transpose_quad(word[0], word[1], word[2], word[3]);
        if (to && 8 * (j + lane) < head_dim) *reinterpret_cast<uint4*>(to + 8 * (j + lane)) = chunk;
      }
    }
  }
};

// Keys or values from kv_begin on, by all threads; zeros past the sequence and the head dimension.
template <typename T, int kRows, int kThreads, typename Tile>
CUTLASS_DEVICE void load_keys(const AttendParams& p, const View& global, const TileView& seq_head, int32_t kv_begin,
                              Tile tile) {
  constexpr int kColumns = Tile::kChunks <= 8 ? 8 : 16, kStep = kThreads / kColumns;
  const int32_t chunk = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  if (chunk >= Tile::kChunks) return;
  const KvRows rows = kv_rows(p.kv, global, seq_head);
  const int32_t left = chunk * 8 < p.head_dim ? rows.count - kv_begin : 0;
  const T* from = static_cast<const T*>(global.data) + rows.base + chunk * 8;
  if (left > 0) from += rows.offset(kv_begin) + row * rows.row_stride;
  CUTE_UNROLL
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool exists = row + i * kStep < left;
    sm80::cp_async16(tile.base + Tile::offset(row + i * kStep, chunk),
                     exists ? from + i * kStep * rows.row_stride : static_cast<const T*>(global.data), exists ? 16 : 0);
  }
}

// The first kernel: dQ of kOwned rows, and lse and delta of them for the second.
template <class Element, int kHeadDim>
struct QueriesBackward : BackwardTraits<Element, kHeadDim, 128, 2> {
  using Base = BackwardTraits<Element, kHeadDim, 128, 2>;
  using Base::kOwned, Base::kStages, Base::kThreads, Base::kVisited, Base::owned, Base::visited;
  using typename Base::T;

  static CUTLASS_DEVICE void run(const AttendBackwardParams& b, const BackwardWorkspace& w, const TileView& seq_head,
                                 const Span& rows) {
    using namespace cute;
    const AttendParams& p = b.forward;
    __shared__ cuda::Shared<TileView> view;
    const TileView& v = view.make([&] { return view_rows(p, seq_head, rows, kVisited); });
    const int32_t num_blocks = v.blocks.size();
    const auto load = [&](int32_t i, int stage) {  // always one group
      if (i < num_blocks) {
        load_keys<T, kVisited, kThreads>(p, p.kv.k, v, v.blocks[i] * kVisited, visited(stage, 0));
        load_keys<T, kVisited, kThreads>(p, p.kv.v, v, v.blocks[i] * kVisited, visited(stage, 1));
      }
      sm80::cp_async_commit();
    };
    load_rows<T, kOwned, kThreads>(b, seq_head, rows.begin, owned(0), owned(1));
    load(0, 0);  // with the rows

    const int warpgroup = threadIdx.x / 128;
    const int32_t own_row = rows.begin + thread_row(warpgroup, 0);
    OwnedRow<T> own[] = {{b, seq_head, v, rows, own_row}, {b, seq_head, v, rows, own_row + 8}};
    own[0].finish(p, w, seq_head, rows, own_row), own[1].finish(p, w, seq_head, rows, own_row + 8);

    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    auto& shared = Base::shared();
    const auto slice_in = mma_in.get_slice(warpgroup * 128);
    const auto slice_out = mma_out.get_slice(warpgroup * 128);
    const auto in_smem = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    const Tensor q = slice_in.partition_fragment_A(in_smem(shared.owned[0], typename Base::LayoutOwned{}));
    const Tensor dout = slice_in.partition_fragment_A(in_smem(shared.owned[1], typename Base::LayoutOwned{}));
    const Tensor k = slice_in.partition_fragment_B(in_smem(shared.visited[0], typename Base::LayoutVisited{}));
    const Tensor values = slice_in.partition_fragment_B(in_smem(shared.visited[1], typename Base::LayoutVisited{}));
    const Tensor k_t = slice_out.partition_fragment_B(in_smem(shared.visited[0], typename Base::LayoutTransposed{}));
    Tensor s = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor ds = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dq = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto left = Base::make_left();
    clear(dq);

    const TileMask masked = v.mask();
    const float scale_log2 = p.scale * kLog2e;
    for (int32_t i = 0; i < num_blocks; ++i) {
      const int stage = i % kStages;
      Base::template await_tile<kStages - 2>();
      issue(mma_in, q(_, _, _), k(_, _, _, stage), s, GMMA::ScaleOut::Zero);
      issue(mma_in, dout(_, _, _), values(_, _, _, stage), ds, GMMA::ScaleOut::Zero);
      load(i + kStages - 1, (i + kStages - 1) % kStages);
      finish<1>(s);
      CUTE_UNROLL
      for (int j = 0; j < size(s); ++j) s(j) = fast_exp2(s(j) * scale_log2 - own[j / 2 % 2].lse);
      finish<0>(ds);
      CUTE_UNROLL
      for (int j = 0; j < size(s); ++j) ds(j) = s(j) * (ds(j) - own[j / 2 % 2].delta);
      const int32_t kv_begin = v.blocks[i] * kVisited;
      if (masked(kv_begin, kv_begin + kVisited)) {
        CUTE_UNROLL
        for (int j = 0; j < size(s); ++j)
          if (!own[j / 2 % 2].keys.contain(kv_begin + j / 4 * 8 + int32_t(threadIdx.x % 4) * 2 + j % 2)) ds(j) = 0.f;
      }
      Base::round(left, ds);
      issue(mma_out, left, k_t(_, _, _, stage), dq, GMMA::ScaleOut::One);
      finish<0>(dq);
    }
    sm80::cp_async_wait<0>();
    Base::store_rows(dq, p.scale, p.head_dim, [&](int32_t row) -> T* {
      if (rows.begin + row >= rows.end) return nullptr;
      return static_cast<T*>(b.grad_q.data) +
             row_offset(b.grad_q.stride, seq_head, tile_row(p, seq_head, rows.begin + row));
    });
  }
};

// The second kernel: dK and dV of kOwned keys.
template <class Element, int kHeadDim>
struct KeysBackward : BackwardTraits<Element, kHeadDim, 64, 4> {
  using Base = BackwardTraits<Element, kHeadDim, 64, 4>;
  using Base::kOwned, Base::kStages, Base::kThreads, Base::kVisited, Base::owned, Base::visited;
  using typename Base::T;

  static CUTLASS_DEVICE void run(const AttendBackwardParams& b, const BackwardWorkspace& w, const TileView& seq_head,
                                 const Span& keys) {
    using namespace cute;
    const AttendParams& p = b.forward;
    auto& shared = Base::shared();
    __shared__ cuda::Shared<QueryBlocks> shared_blocks;
    const QueryBlocks& blocks = shared_blocks.make([&] { return blocks_seeing(p, w, seq_head, keys, kVisited); });
    int32_t ahead = blocks.first();     // the block that is loaded next
    const auto load = [&](int stage) {  // always one group
      if (ahead < blocks.end()) {
        load_rows<T, kVisited, kThreads>(b, seq_head, ahead * kVisited, visited(stage, 0), visited(stage, 1));
        load_visited_rows(b, w, seq_head, {keys.begin, keys.begin + kOwned}, ahead * kVisited, shared.rows[stage]);
        ahead = blocks.after(ahead);
      }
      sm80::cp_async_commit();
    };
    load_keys<T, kOwned, kThreads>(p, p.kv.k, seq_head, keys.begin, owned(0));
    load_keys<T, kOwned, kThreads>(p, p.kv.v, seq_head, keys.begin, owned(1));
    int32_t m = ahead;
    CUTE_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) load(stage);  // the first with the keys

    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    const int warpgroup = threadIdx.x / 128;
    const auto slice_in = mma_in.get_slice(warpgroup * 128);
    const auto slice_out = mma_out.get_slice(warpgroup * 128);
    const auto in_smem = [](Element* data, auto layout) { return make_tensor(make_smem_ptr(data), layout); };
    const Tensor k = slice_in.partition_fragment_A(in_smem(shared.owned[0], typename Base::LayoutOwned{}));
    const Tensor values = slice_in.partition_fragment_A(in_smem(shared.owned[1], typename Base::LayoutOwned{}));
    const Tensor q = slice_in.partition_fragment_B(in_smem(shared.visited[0], typename Base::LayoutVisited{}));
    const Tensor dout = slice_in.partition_fragment_B(in_smem(shared.visited[1], typename Base::LayoutVisited{}));
    const Tensor q_t = slice_out.partition_fragment_B(in_smem(shared.visited[0], typename Base::LayoutTransposed{}));
    const Tensor dout_t = slice_out.partition_fragment_B(in_smem(shared.visited[1], typename Base::LayoutTransposed{}));
    Tensor s = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor ds = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dk = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    Tensor dv = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto prob_left = Base::make_left(), ds_left = Base::make_left();
    clear(dk);
    clear(dv);

    const float scale_log2 = p.scale * kLog2e;
    const int column = int(threadIdx.x % 4) * 2;
    for (int stage = 0; m < blocks.end(); m = blocks.after(m), stage = (stage + 1) % kStages) {
      Base::template await_tile<kStages - 2>();
      issue(mma_in, k(_, _, _), q(_, _, _, stage), s, GMMA::ScaleOut::Zero);
      issue(mma_in, values(_, _, _), dout(_, _, _, stage), ds, GMMA::ScaleOut::Zero);
      load((stage + kStages - 1) % kStages);
      const VisitedRows<kVisited>& rows = shared.rows[stage];
      const auto hide = [&](auto& x) {
        const int32_t key = keys.begin + thread_row(warpgroup, 0);
        CUTE_UNROLL
        for (int j = 0; j < kVisited / 8; ++j) CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          const VisibleKeys seen = rows.keys[8 * j + column + c];
          if (!seen.contain(key)) x(4 * j + c) = 0.f;
          if (!seen.contain(key + 8)) x(4 * j + 2 + c) = 0.f;
        }
      };
      finish<1>(s);
      CUTE_UNROLL
      for (int j = 0; j < kVisited / 8; ++j) {
        const float2 lse = *reinterpret_cast<const float2*>(&rows.lse[8 * j + column]);
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) s(4 * j + i) = fast_exp2(s(4 * j + i) * scale_log2 - (i % 2 ? lse.y : lse.x));
      }
      if (rows.needs_mask) hide(s);
      Base::round(prob_left, s);
      issue(mma_out, prob_left, dout_t(_, _, _, stage), dv, GMMA::ScaleOut::One);
      finish<1>(ds);
      CUTE_UNROLL
      for (int j = 0; j < kVisited / 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[8 * j + column]);
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) ds(4 * j + i) = s(4 * j + i) * (ds(4 * j + i) - (i % 2 ? delta.y : delta.x));
      }
      if (rows.needs_mask) hide(ds);
      Base::round(ds_left, ds);
      issue(mma_out, ds_left, q_t(_, _, _, stage), dk, GMMA::ScaleOut::One);
      finish<0>(dk);
      warpgroup_fence_operand(dv);
    }
    sm80::cp_async_wait<0>();
    const auto write = [&](const auto& from, float factor, const MutableView& to) {
      Base::store_rows(from, factor, p.head_dim, [&](int32_t row) -> T* {
        if (keys.begin + row >= keys.end) return nullptr;
        return static_cast<T*>(to.data) + seq_head.tile.seq * to.stride.b + seq_head.tile.kv_head * to.stride.h +
               int64_t(seq_head.kv_rows.begin + keys.begin + row) * to.stride.s;
      });
    };
    write(dk, p.scale, b.grad_k);
    write(dv, 1.f, b.grad_v);
  }
};

}  // namespace flux::cuda::sm90
