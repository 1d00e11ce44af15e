// The gradient of the queries on Hopper.
#pragma once

#include "cuda/sm90/backward_traits.h"

namespace flux::cuda::sm90 {

// Place: of a walk's OfRows.
template <class Place>
struct VisitedKeys : Place {
  int32_t begin;
  bool masked;
};

// The first kernel: dQ of kOwned rows, and lse and delta of them for the second.
template <class Element, int kHeadDim, class Walks>
struct QueriesBackward : BackwardTraits<Element, kHeadDim, 128, kHeadDim <= 128 ? 128 : 64,
                                        VisitedKeys<typename Walks::template OfRows<CudaElement<Element>>::Place>> {
  using Walk = typename Walks::template OfRows<CudaElement<Element>>;
  using Visited = VisitedKeys<typename Walk::Place>;
  using Base = BackwardTraits<Element, kHeadDim, 128, kHeadDim <= 128 ? 128 : 64, Visited>;
  // Of three buffers, where there are no more, values before keys: then both come a block ahead.
  static constexpr bool kValuesFirst = Base::kBuffers == 3;

  using Base::kOwned, Base::kVisited, Base::owned, Base::visited;
  using typename Base::T, typename Base::Filling, typename Base::Emptying;

  using Params = typename Walks::Params;
  using Workspace = typename Walks::Workspace;

  static CUTLASS_DEVICE void run(const Params& b, const Workspace& w, const TileView& seq_head, const Span& rows) {
    const AttendParams& p = b.forward;
    __shared__ cuda::Shared<Walk> shared_walk;
    if (threadIdx.x == 0) Base::init_barriers();
    const Walk& walk = shared_walk.make([&] { return Walk(view_rows(p, seq_head, rows, kVisited), kVisited); });
    if (threadIdx.x < kLoadThreads) {
      cutlass::arch::warpgroup_reg_dealloc<Base::kLoadRegs>();
      load(b, seq_head, walk, rows);
    } else {
      cutlass::arch::warpgroup_reg_alloc<Base::kMathRegs>();
      multiply(b, w, seq_head, walk, rows, cutlass::canonical_warp_group_idx() - 1);
    }
  }

 private:
  static CUTLASS_DEVICE void load(const Params& b, const TileView& seq_head, const Walk& walk, const Span& rows) {
    const AttendParams& p = b.forward;
    const TileView& v = walk.view();
    const auto masked = walk.mask();
    load_rows<T, kOwned, kLoadThreads>(b, seq_head, rows.begin, owned(0), owned(1));  // come with the first keys
    const KeyLoader<T, typename Base::VisitedTile> keys(p, p.kv.k, v), values(p, p.kv.v, v);
    Filling buffers;
    for (int32_t i = 0; i < walk.size(); ++i) {
      const int32_t begin = walk[i] * kVisited;
      const auto load_values = [&] {
        const int to = buffers.await();
        values.template load<kVisited>(begin, visited(to));
        buffers.hand_over(to);
      };
      if (kValuesFirst) load_values();
      const int to = buffers.await();
      const auto place = walk.place(i);
      if (threadIdx.x == 0)
        Base::shared().info[to] = {place, begin, walk.needs_mask(masked, place, begin, begin + kVisited)};
      keys.template load<kVisited>(begin, visited(to));
      buffers.hand_over(to);
      if (!kValuesFirst) load_values();
    }
    sm80::cp_async_wait<0>();
  }

  static CUTLASS_DEVICE void multiply(const Params& b, const Workspace& w, const TileView& seq_head, const Walk& walk,
                                      const Span& rows, int warpgroup) {
    using namespace cute;
    const AttendParams& p = b.forward;
    const TileView& v = walk.view();
    const int32_t num_blocks = walk.size();
    const int32_t own_row = rows.begin + thread_row(warpgroup, 0);
    typename Walk::Row own[] = {{b, seq_head, v, rows, own_row}, {b, seq_head, v, rows, own_row + 8}};
    own[0].finish(p, w, seq_head, rows, own_row), own[1].finish(p, w, seq_head, rows, own_row + 8);

    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    auto& shared = Base::shared();
    const auto slice_in = mma_in.get_slice(warpgroup * 128);
    const auto slice_out = mma_out.get_slice(warpgroup * 128);
    const Tensor q = slice_in.partition_fragment_A(Base::in_smem(shared.owned[0], typename Base::LayoutOwned{}));
    const Tensor dout = slice_in.partition_fragment_A(Base::in_smem(shared.owned[1], typename Base::LayoutOwned{}));
    const Tensor kv = slice_in.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutVisited{}));
    const Tensor k_t = slice_out.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutTransposed{}));
    Tensor s = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor ds = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dq = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto left = Base::make_left();
    clear(dq);

    const float scale_log2 = p.scale * kLog2e;
    Emptying buffers;
    int k;
    const auto start_scores = [&] { issue(mma_in, q(_, _, _), kv(_, _, _, k), s, GMMA::ScaleOut::Zero); };
    const auto start_output = [&](int of) { issue(mma_out, left, k_t(_, _, _, of), dq, GMMA::ScaleOut::One); };
    const auto hide = [&](const Visited& visited) {
      const int32_t base = visited.begin + int32_t(threadIdx.x % 4) * 2;
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        const int32_t row = own_row + 8 * r, token = row / p.group() - (v.q_rows.begin - seq_head.q_rows.begin);
        const VisibleKeys keys = row < rows.end ? walk.visible_keys(token, visited) : VisibleKeys{};
        overwrite(s, r, columns_hidden(keys, base), 0.f);
      }
    };
    const auto start_ds = [&] {
      const int values = buffers.await();
      issue(mma_in, dout(_, _, _), kv(_, _, _, values), ds, GMMA::ScaleOut::Zero);
      return values;
    };
    const auto find_left = [&](int values) {
      if constexpr (kValuesFirst) {
        finish<0>(s);
        warpgroup_fence_operand(ds);
      } else {
        finish<1>(s);
      }
      CUTE_UNROLL
      for (int j = 0; j < size(s); ++j) s(j) = fast_exp2(s(j) * scale_log2 - walk.lse(own[j / 2 % 2], shared.info[k]));
      // The branch also keeps these exponentials before the wait for dP.
      if (const Visited visited = shared.info[k]; visited.masked) hide(visited);
      if constexpr (!kValuesFirst) finish<0>(ds);
      buffers.give_back(values);
      CUTE_UNROLL
      for (int j = 0; j < size(s); ++j) ds(j) = s(j) * (ds(j) - walk.delta(own[j / 2 % 2], shared.info[k]));
      Base::round(left, ds);
    };
    if constexpr (Base::kAhead) {
      if (num_blocks > 0) {
        k = buffers.await();
        start_scores();
        find_left(start_ds());
        for (int32_t i = 1; i < num_blocks; ++i) {
          const int before = k;
          k = buffers.await();
          start_output(before);
          start_scores();
          const int values = start_ds();
          finish<2>(dq);
          buffers.give_back(before);
          find_left(values);
        }
        start_output(k);
        finish<0>(dq);
      }
    } else {
      for (int32_t i = 0; i < num_blocks; ++i) {
        int values;
        if constexpr (kValuesFirst) {
          values = start_ds();
          k = buffers.await();
          start_scores();
        } else {
          k = buffers.await();
          start_scores();
          values = start_ds();
        }
        find_left(values);
        start_output(k);
        finish<0>(dq);
        buffers.give_back(k);
      }
    }
    Base::store_rows(warpgroup, dq, p.scale, p.head_dim, [&](int32_t row) -> T* {
      if (rows.begin + row >= rows.end) return nullptr;
      return static_cast<T*>(b.grad_q.data) +
             row_offset(b.grad_q.stride, seq_head, tile_row(p, seq_head, rows.begin + row));
    });
  }
};

}  // namespace flux::cuda::sm90
