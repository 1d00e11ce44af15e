// A consumer warpgroup: 64 rows of a tile against its key blocks.
#pragma once

#include <cutlass/numeric_conversion.h>

#include "cuda/sm90/epilogue.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/rows.h"
#include "cuda/sm90/traits.h"

namespace flux::cuda::sm90 {

// Starts acc (+)= a * b as one group of WGMMA instructions.
template <class Mma, class A, class B, class C>
CUTLASS_DEVICE void issue(Mma mma, const A& a, const B& b, C& acc, cute::GMMA::ScaleOut first) {
  cute::warpgroup_fence_operand(acc);
  cute::warpgroup_arrive();
  mma.accumulate_ = first;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), acc);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(acc);
}

// Waits until at most n of the started groups are unfinished; acc belongs to a finished one.
template <int n, class C>
CUTLASS_DEVICE void finish(C& acc) {
  cute::warpgroup_wait<n>();
  cute::warpgroup_fence_operand(acc);
}

// The warpgroups start their products in turn, so that one's softmax runs beside another's products.
template <class T>
struct Turns {
  int warpgroup;
  CUTLASS_DEVICE static void pass_to(int warpgroup) {
    if constexpr (T::kWarpgroups > 1) cutlass::arch::NamedBarrier::arrive(256, kFirst + warpgroup);
  }
  CUTLASS_DEVICE void begin() const {
    if constexpr (T::kWarpgroups > 1) cutlass::arch::NamedBarrier::sync(256, kFirst + warpgroup);
  }
  CUTLASS_DEVICE void end() const { pass_to(warpgroup + 1 == T::kWarpgroups ? 0 : warpgroup + 1); }
  static constexpr int kFirst = 0;                 // named barriers: one per warpgroup,
  static constexpr int kPrivate = T::kWarpgroups;  // and one more each for itself
};

template <class T>
class Consumer {
 public:
  CUTLASS_DEVICE Consumer(const KernelParams& p, typename T::Shared& shared, int warpgroup)
      : p_(p), shared_(shared), turns_{warpgroup}, scale_log2_(p.attend.scale * kLog2e) {}

  CUTLASS_DEVICE void run() {
    if (turns_.warpgroup == T::kWarpgroups - 1) turns_.end();  // the first turn
    for (Ring<T::kWorkSlots> ring;; ring.advance()) {
      shared_.work_full[ring.index].wait(ring.phase);
      const Piece work = shared_.work[ring.index];
      release(shared_.work_empty[ring.index]);
      if (work.view.tile.seq < 0) return;
      run_tile(work);
    }
  }

 private:
  // Every warp says for itself that it is done with a buffer.
  CUTLASS_DEVICE static void release(const typename T::Barrier& empty) {
    __syncwarp();
    if (cutlass::canonical_lane_idx() == 0) empty.arrive();
  }

  CUTLASS_DEVICE void run_tile(const Piece& work) {
    using namespace cute;
    using Element = typename T::Element;
    typename T::MmaQK mma_qk;
    typename T::MmaPV mma_pv;
    const auto slice_qk = mma_qk.get_slice(turns_.warpgroup * 128);
    const auto slice_pv = mma_pv.get_slice(turns_.warpgroup * 128);
    const Tensor q = slice_qk.partition_fragment_A(make_tensor(make_smem_ptr(shared_.q), typename T::LayoutQ{}));
    const Tensor k = slice_qk.partition_fragment_B(make_tensor(make_smem_ptr(shared_.k), typename T::LayoutK{}));
    const Tensor v = slice_pv.partition_fragment_B(make_tensor(make_smem_ptr(shared_.v), typename T::LayoutVt{}));
    Tensor s = partition_fragment_C(mma_qk, Shape<Int<T::kRows>, Int<T::kKvBlock>>{});
    Tensor o = partition_fragment_C(mma_pv, Shape<Int<T::kRows>, Int<T::kHeadDim>>{});
    Tensor probs = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<T::kKvBlock / 16>>>{});
    const auto convert_probs = [&] {
      using Convert = cutlass::NumericArrayConverter<Element, float, decltype(size(s))::value>;
      using In = typename Convert::source_type;
      using Out = typename Convert::result_type;
      *reinterpret_cast<Out*>(probs.data()) = Convert{}(*reinterpret_cast<const In*>(s.data()));
    };

    const TileView& view = work.view;
    const int32_t first_row = turns_.warpgroup * 64 + int32_t(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
    const int32_t rows[2] = {first_row, first_row + 8};
    const TileRow where[2] = {tile_row(p_.attend, view, rows[0]), tile_row(p_.attend, view, rows[1])};
    const RowMask mask[2] = {row_mask(view, where[0].token), row_mask(view, where[1].token)};
    RowSoftmax softmax;
    clear(o);

    const int32_t count = work.span.end - work.span.begin;
    if (count > 0) {
      shared_.q_full.wait(q_phase_);
      q_phase_ ^= 1;
      wait_k();
      typename T::BlockInfo info = shared_.info[k_ring_.index];
      issue(mma_qk, q, k(_, _, _, k_ring_.index), s, GMMA::ScaleOut::Zero);
      finish<0>(s);
      release_k();
      if (info.masked) apply_mask(s, mask, info.kv_begin);
      softmax.update(s, scale_log2_);
      convert_probs();
      // Only the last key block, which comes first, can reach past the sequence.
      if (info.kv_begin + T::kKvBlock > view.kv_rows.size()) clear_v(view.kv_rows.size() - info.kv_begin);

      if (count > 1) wait_k();
      for (int32_t i = 1; i < count; ++i) {
        info = shared_.info[k_ring_.index];
        turns_.begin();
        issue(mma_qk, q, k(_, _, _, k_ring_.index), s, GMMA::ScaleOut::Zero);
        wait_v();
        issue(mma_pv, probs, v(_, _, _, v_ring_.index), o, GMMA::ScaleOut::One);
        turns_.end();
        finish<1>(s);
        release_k();
        if (info.masked) apply_mask(s, mask, info.kv_begin);
        softmax.update(s, scale_log2_);
        // Waiting for the next keys here, not where they are used, also keeps the compiler from moving the wait for the
        // second product up before the softmax that is to run beside it.
        if (i + 1 < count) wait_k();
        finish<0>(o);
        release_v();
        convert_probs();
        softmax.rescale(o);
      }

      release(shared_.q_empty);
      wait_v();
      issue(mma_pv, probs, v(_, _, _, v_ring_.index), o, GMMA::ScaleOut::One);
      finish<0>(o);
      release_v();
    }
    const SoftmaxState state[2] = {softmax.finish(0, scale_log2_), softmax.finish(1, scale_log2_)};
    store_rows<T>(p_, work, rows, where, state, o);
  }

  CUTLASS_DEVICE void wait_k() { shared_.k_full[k_ring_.index].wait(k_ring_.phase); }
  CUTLASS_DEVICE void wait_v() { shared_.v_full[v_ring_.index].wait(v_ring_.phase); }
  CUTLASS_DEVICE void release_k() {
    release(shared_.k_empty[k_ring_.index]);
    k_ring_.advance();
  }
  CUTLASS_DEVICE void release_v() {
    release(shared_.v_empty[v_ring_.index]);
    v_ring_.advance();
  }

  // Rows of V past the end of the sequence hold anything, NaN included, and 0 * NaN is NaN. Every warpgroup clears
  // them all for itself: no need to wait for another.
  CUTLASS_DEVICE void clear_v(int32_t first_row) {
    wait_v();
    typename T::Element* stage = shared_.v + v_ring_.index * T::kStageElements;
    constexpr int kChunks = T::kSlab / 8;  // of 16 bytes in a row of a slab
    for (int32_t i = first_row * kChunks + int32_t(threadIdx.x % 128); i < T::kKvBlock * kChunks; i += 128)
      CUTE_UNROLL
      for (int s = 0; s < T::kSlabs; ++s)
        reinterpret_cast<uint4*>(stage + s * T::kKvBlock * T::kSlab)[i] = uint4{0, 0, 0, 0};
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, Turns<T>::kPrivate + turns_.warpgroup);
  }

  const KernelParams& p_;
  typename T::Shared& shared_;
  const Turns<T> turns_;
  const float scale_log2_;
  Ring<T::kStages> k_ring_, v_ring_;
  uint32_t q_phase_ = 0;
};

}  // namespace flux::cuda::sm90
