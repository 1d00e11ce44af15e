// The gradients of the keys and values on Hopper.
#pragma once

#include "cuda/sm90/backward_traits.h"

namespace flux::cuda::sm90 {

// The second kernel: dK and dV of kOwned keys. One warpgroup loads; the others call multiply(walk, warpgroup).
template <class Base, class Walks, class Multiply>
CUTLASS_DEVICE void run_keys(const typename Walks::Params& b, const typename Walks::Workspace& w,
                             const TileView& seq_head, const Span& keys, Multiply multiply) {
  using T = typename Base::T;
  constexpr int kVisited = Base::kVisited;
  const AttendParams& p = b.forward;
  using Walk = typename Walks::OfKeys;
  __shared__ cuda::Shared<Walk> shared_walk;
  if (threadIdx.x == 0) Base::init_barriers();
  const Walk& walk = shared_walk.make([&] { return Walk(p, w, seq_head, keys, kVisited); });
  if (threadIdx.x >= kLoadThreads) {
    cutlass::arch::warpgroup_reg_alloc<Base::kMathRegs>();
    multiply(walk, cutlass::canonical_warp_group_idx() - 1);
    return;
  }
  cutlass::arch::warpgroup_reg_dealloc<Base::kLoadRegs>();
  using Keys = KeyLoader<T, typename Base::OwnedTile>;
  Keys(p, p.kv.k, seq_head).template load<Base::kOwned>(keys.begin, Base::owned(0));  // come with the first rows
  Keys(p, p.kv.v, seq_head).template load<Base::kOwned>(keys.begin, Base::owned(1));
  const RowLoader<T, kVisited, typename Base::VisitedTile> rows(b, seq_head);
  const RowFactsLoader<Walks, kVisited> facts(b, w, seq_head, walk, {keys.begin, keys.begin + Base::kOwned});
  typename Base::Filling buffers;
  for (int32_t i = walk.first(); i < walk.end();) {
    const int q = buffers.await(), dout = buffers.await();
    rows.load(walk[i], Base::visited(q), Base::visited(dout));
    facts.load(i, Base::shared().info[q]);
    i = walk.after(i);
    if (threadIdx.x == 0) Base::shared().info[q].last = i >= walk.end();
    buffers.hand_over(q), buffers.hand_over(dout);
  }
  sm80::cp_async_wait<0>();
}

// Replaces scores by probabilities, all of which count.
template <int kVisited, class Scores>
CUTLASS_DEVICE void find_all_probs(Scores& s, const VisitedRows<kVisited>& rows, float scale_log2) {
  const int column = int(threadIdx.x % 4) * 2;
  CUTE_UNROLL
  for (int j = 0; j < kVisited / 8; ++j) {
    const float2 lse = *reinterpret_cast<const float2*>(&rows.lse[8 * j + column]);
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) s(4 * j + i) = fast_exp2(s(4 * j + i) * scale_log2 - (i % 2 ? lse.y : lse.x));
  }
}

// The same of keys from `key` on (thread_row), where some may be hidden.
template <int kVisited, class Scores>
CUTLASS_DEVICE void find_probs(Scores& s, const VisitedRows<kVisited>& rows, float scale_log2, int32_t key) {
  find_all_probs<kVisited>(s, rows, scale_log2);
  if (!rows.needs_mask) return;
  const int column = int(threadIdx.x % 4) * 2;
  CUTE_UNROLL
  for (int j = 0; j < kVisited / 8; ++j) CUTE_UNROLL
  for (int c = 0; c < 2; ++c) {
    const VisibleKeys seen = rows.keys[8 * j + column + c];
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const int32_t own = key + 8 * r;  // VisibleKeys::contain, without branches
      const bool sees = (own <= seen.last) & ((own >= seen.begin) | (own < seen.sink));
      s(4 * j + 2 * r + c) = sees ? s(4 * j + 2 * r + c) : 0.f;
    }
  }
}

// Probabilities 2 i and 2 i + 1: as they are, or rounded, two in a register. (One at a time, the compiler takes such a
// register apart and puts it together again.)
template <class T, class Probs>
CUTLASS_DEVICE float2 prob_pair(const Probs& probs, int i) {
  if constexpr (std::is_same_v<typename Probs::value_type, float>)
    return {probs(2 * i), probs(2 * i + 1)};
  else
    return unpack<T>(reinterpret_cast<const uint32_t*>(probs.data())[i]);
}

// Replaces dP by dS.
template <class T, int kVisited, class Products, class Probs>
CUTLASS_DEVICE void find_ds(Products& ds, const Probs& probs, const VisitedRows<kVisited>& rows) {
  const int column = int(threadIdx.x % 4) * 2;
  CUTE_UNROLL
  for (int j = 0; j < kVisited / 8; ++j) {
    const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[8 * j + column]);
    CUTE_UNROLL
    for (int i = 2 * j; i < 2 * j + 2; ++i) {
      const float2 p = prob_pair<T>(probs, i);
      ds(2 * i) = p.x * (ds(2 * i) - delta.x), ds(2 * i + 1) = p.y * (ds(2 * i + 1) - delta.y);
    }
  }
}

// Writes dK or dV of this thread's keys.
template <class Base, class Output>
CUTLASS_DEVICE void store_keys(const AttendParams& p, const TileView& seq_head, const Span& keys, int warpgroup,
                               const Output& from, float factor, const MutableView& to) {
  using T = typename Base::T;
  Base::store_rows(warpgroup, from, factor, p.head_dim, [&](int32_t row) -> T* {
    if (keys.begin + row >= keys.end) return nullptr;
    return static_cast<T*>(to.data) + seq_head.tile.seq * to.stride.b + seq_head.tile.kv_head * to.stride.h +
           int64_t(seq_head.kv_rows.begin + keys.begin + row) * to.stride.s;
  });
}

template <class Element, int kHeadDim, class Walks>
struct KeysBackward : BackwardTraits<Element, kHeadDim, 128, 64, VisitedRows<64>> {
  // For dS, too, or are they taken from what dV's product gets, rounded? There is no register left for both.
  static constexpr bool kKeepsProbs = kHeadDim < 128;

  using Base = BackwardTraits<Element, kHeadDim, 128, 64, VisitedRows<64>>;
  // Do the warpgroups start their first products in turn, so that one works out P and dS beside the other's products?
  // Not where these products are under way beside the last ones anyway.
  static constexpr bool kTakesTurns = !Base::kAhead;
  using Base::kOwned, Base::kVisited;
  using typename Base::Emptying;

  static CUTLASS_DEVICE void run(const typename Walks::Params& b, const typename Walks::Workspace& w,
                                 const TileView& seq_head, const Span& keys) {
    run_keys<Base, Walks>(b, w, seq_head, keys, [&](const typename Walks::OfKeys& walk, int warpgroup) {
      multiply(b, seq_head, keys, walk, warpgroup);
    });
  }

 private:
  static CUTLASS_DEVICE void begin_turn(int warpgroup) {
    if constexpr (kTakesTurns) cutlass::arch::NamedBarrier::sync(Base::kMathThreads, warpgroup);
  }
  static CUTLASS_DEVICE void end_turn(int warpgroup) {
    if constexpr (kTakesTurns) cutlass::arch::NamedBarrier::arrive(Base::kMathThreads, 1 - warpgroup);
  }

  static CUTLASS_DEVICE void multiply(const AttendBackwardParams& b, const TileView& seq_head, const Span& keys,
                                      const typename Walks::OfKeys& walk, int warpgroup) {
    using namespace cute;
    const AttendParams& p = b.forward;
    auto& shared = Base::shared();
    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    const auto slice_in = mma_in.get_slice(warpgroup * 128);
    const auto slice_out = mma_out.get_slice(warpgroup * 128);
    const Tensor k = slice_in.partition_fragment_A(Base::in_smem(shared.owned[0], typename Base::LayoutOwned{}));
    const Tensor values = slice_in.partition_fragment_A(Base::in_smem(shared.owned[1], typename Base::LayoutOwned{}));
    const Tensor rows = slice_in.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutVisited{}));
    const Tensor rows_t =
        slice_out.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutTransposed{}));
    Tensor s = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor ds = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dk = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    Tensor dv = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto prob_left = Base::make_left(), ds_left = Base::make_left();
    clear(dk);
    clear(dv);

    const float scale_log2 = p.scale * kLog2e;
    const int32_t key = keys.begin + thread_row(warpgroup, 0);
    Emptying buffers;
    int q, dout;  // the buffers at hand
    const auto start_in = [&] {
      begin_turn(warpgroup);
      q = buffers.await();
      issue(mma_in, k(_, _, _), rows(_, _, _, q), s, GMMA::ScaleOut::Zero);
      dout = buffers.await();
      issue(mma_in, values(_, _, _), rows(_, _, _, dout), ds, GMMA::ScaleOut::Zero);
      end_turn(warpgroup);
    };
    const auto start_dv = [&](int of) { issue(mma_out, prob_left, rows_t(_, _, _, of), dv, GMMA::ScaleOut::One); };
    const auto start_dk = [&](int of) { issue(mma_out, ds_left, rows_t(_, _, _, of), dk, GMMA::ScaleOut::One); };
    const auto find_left_of_dv = [&] {
      find_probs<kVisited>(s, shared.info[q], scale_log2, key);
      Base::round(prob_left, s);
    };
    const auto find_left_of_dk = [&] {
      if constexpr (kKeepsProbs)
        find_ds<typename Base::T, kVisited>(ds, s, shared.info[q]);
      else
        find_ds<typename Base::T, kVisited>(ds, prob_left, shared.info[q]);
      Base::round(ds_left, ds);
    };
    const auto give_back = [&](int of_q, int of_dout) { buffers.give_back(of_q), buffers.give_back(of_dout); };
    if (walk.first() >= walk.end()) {  // nobody sees these keys
    } else if constexpr (Base::kAhead) {
      start_in();
      finish<1>(s);
      find_left_of_dv();
      finish<0>(ds);
      find_left_of_dk();
      while (!shared.info[q].last) {
        const int q_before = q, dout_before = dout;
        start_dv(dout_before);
        start_dk(q_before);
        start_in();
        finish<2>(dk);
        warpgroup_fence_operand(dv);
        give_back(q_before, dout_before);
        finish<1>(s);
        find_left_of_dv();
        finish<0>(ds);
        find_left_of_dk();
      }
      start_dv(dout);
      start_dk(q);
      finish<0>(dk);
      warpgroup_fence_operand(dv);
    } else {
      if (warpgroup == 1) end_turn(warpgroup);  // so warpgroup 0 comes first
      for (bool last = false; !last;) {
        start_in();
        last = shared.info[q].last;
        finish<1>(s);
        find_left_of_dv();
        start_dv(dout);
        finish<1>(ds);
        find_left_of_dk();
        start_dk(q);
        finish<0>(dk);
        warpgroup_fence_operand(dv);
        give_back(q, dout);
      }
    }
    store_keys<Base>(p, seq_head, keys, warpgroup, dk, p.scale, b.grad_k);
    store_keys<Base>(p, seq_head, keys, warpgroup, dv, 1.f, b.grad_v);
  }
};

// Probabilities as each thread of one warpgroup hands them to the same thread of the other.
struct ProbExchange {
  static constexpr int kSlots = 2;
  uint4 words[kSlots][4][128];
  Barrier full[kSlots], empty[kSlots];

  CUTLASS_DEVICE void init() {
    for (int i = 0; i < kSlots; ++i) full[i].init(128), empty[i].init(128);
  }
};

// Above head dimension 128, dK and dV of 64 keys fill two warpgroups' registers: one finds P and dV, and hands P,
// rounded, to the other, which finds dS and dK.
template <class Element, int kHeadDim, class Walks>
struct WideKeysBackward : BackwardTraits<Element, kHeadDim, 64, 64, VisitedRows<64>, ProbExchange> {
  using Base = BackwardTraits<Element, kHeadDim, 64, 64, VisitedRows<64>, ProbExchange>;
  using Base::kOwned, Base::kVisited;
  using typename Base::Emptying;

  static CUTLASS_DEVICE void run(const typename Walks::Params& b, const typename Walks::Workspace& w,
                                 const TileView& seq_head, const Span& keys) {
    run_keys<Base, Walks>(b, w, seq_head, keys, [&](const typename Walks::OfKeys& walk, int warpgroup) {
      const bool empty = walk.first() >= walk.end();  // nobody sees these keys
      if (warpgroup == 0)
        find_dv(b, seq_head, keys, empty);
      else
        find_dk(b, seq_head, keys, empty);
    });
  }

 private:
  static CUTLASS_DEVICE void find_dv(const AttendBackwardParams& b, const TileView& seq_head, const Span& keys,
                                     bool empty) {
    using namespace cute;
    const AttendParams& p = b.forward;
    auto& shared = Base::shared();
    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    const auto slice_in = mma_in.get_slice(0);
    const auto slice_out = mma_out.get_slice(0);
    const Tensor k = slice_in.partition_fragment_A(Base::in_smem(shared.owned[0], typename Base::LayoutOwned{}));
    const Tensor rows = slice_in.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutVisited{}));
    const Tensor rows_t =
        slice_out.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutTransposed{}));
    Tensor s = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dv = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto prob_left = Base::make_left();
    clear(dv);
    const float scale_log2 = p.scale * kLog2e;
    const int32_t key = keys.begin + thread_row(0, 0);
    Emptying buffers;
    Ring<ProbExchange::kSlots> slot;
    for (bool last = empty; !last;) {
      const int q = buffers.await();
      issue(mma_in, k(_, _, _), rows(_, _, _, q), s, GMMA::ScaleOut::Zero);
      last = shared.info[q].last;
      const int dout = buffers.await();
      finish<0>(s);
      find_probs<kVisited>(s, shared.info[q], scale_log2, key);
      buffers.give_back(q);
      Base::round(prob_left, s);
      shared.exchange.empty[slot.index].wait(slot.phase ^ 1);
      CUTE_UNROLL
      for (int i = 0; i < kVisited / 16; ++i)
        shared.exchange.words[slot.index][i][threadIdx.x % 128] = reinterpret_cast<const uint4*>(prob_left.data())[i];
      shared.exchange.full[slot.index].arrive();
      slot.advance();
      issue(mma_out, prob_left, rows_t(_, _, _, dout), dv, GMMA::ScaleOut::One);
      finish<0>(dv);
      buffers.give_back(dout);
    }
    store_keys<Base>(p, seq_head, keys, 0, dv, 1.f, b.grad_v);
  }

  static CUTLASS_DEVICE void find_dk(const AttendBackwardParams& b, const TileView& seq_head, const Span& keys,
                                     bool empty) {
    using namespace cute;
    const AttendParams& p = b.forward;
    auto& shared = Base::shared();
    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    const auto slice_in = mma_in.get_slice(0);
    const auto slice_out = mma_out.get_slice(0);
    const Tensor values = slice_in.partition_fragment_A(Base::in_smem(shared.owned[1], typename Base::LayoutOwned{}));
    const Tensor rows = slice_in.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutVisited{}));
    const Tensor rows_t =
        slice_out.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutTransposed{}));
    Tensor ds = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dk = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto probs = Base::make_left(), ds_left = Base::make_left();
    clear(dk);
    Emptying buffers;
    Ring<ProbExchange::kSlots> slot;
    for (bool last = empty; !last;) {
      const int q = buffers.await(), dout = buffers.await();
      issue(mma_in, values(_, _, _), rows(_, _, _, dout), ds, GMMA::ScaleOut::Zero);
      last = shared.info[q].last;
      shared.exchange.full[slot.index].wait(slot.phase);
      CUTE_UNROLL
      for (int i = 0; i < kVisited / 16; ++i)
        reinterpret_cast<uint4*>(probs.data())[i] = shared.exchange.words[slot.index][i][threadIdx.x % 128];
      shared.exchange.empty[slot.index].arrive();
      slot.advance();
      finish<0>(ds);
      buffers.give_back(dout);
      find_ds<typename Base::T, kVisited>(ds, probs, shared.info[q]);
      Base::round(ds_left, ds);
      issue(mma_out, ds_left, rows_t(_, _, _, q), dk, GMMA::ScaleOut::One);
      finish<0>(dk);
      buffers.give_back(q);
    }
    store_keys<Base>(p, seq_head, keys, 0, dk, p.scale, b.grad_k);
  }
};

}  // namespace flux::cuda::sm90
