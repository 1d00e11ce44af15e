// A consumer warpgroup: 64 rows of every tile against its key blocks.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_conversion.h>

#include "cuda/sm90/epilogue.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/thread_rows.h"
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
  CUTLASS_DEVICE void begin() const {
    if constexpr (T::kTakesTurns) cutlass::arch::NamedBarrier::sync(256, kFirst + warpgroup);
  }
  CUTLASS_DEVICE void end() const {
    const int next = warpgroup + 1 == T::kWarpgroups ? 0 : warpgroup + 1;
    if constexpr (T::kTakesTurns) cutlass::arch::NamedBarrier::arrive(256, kFirst + next);
  }
  static constexpr int kFirst = 0;                 // named barriers: one per warpgroup,
  static constexpr int kPrivate = T::kWarpgroups;  // and one more each for itself
};

template <class T>
class Consumer {
 public:
  CUTLASS_DEVICE Consumer(const KernelParams& p, typename T::Shared& shared, int warpgroup)
      : p_(p), shared_(shared), warpgroup_(warpgroup), turns_{warpgroup}, scale_log2_(p.attend.scale * kLog2e) {}

  // The first product of a key block, S = Q K^T, is started before the second one of the block before it, O += P V; the
  // softmax of the block then runs beside that second product. The same from tile to tile: the first block of a tile
  // follows the last one of the tile before it.
  CUTLASS_DEVICE void run() {
    using namespace cute;
    using Element = typename T::Element;
    typename T::MmaQK mma_qk;
    typename T::MmaPV mma_pv;
    const auto slice_qk = mma_qk.get_slice(warpgroup_ * 128);
    const auto slice_pv = mma_pv.get_slice(warpgroup_ * 128);
    const Tensor q = slice_qk.partition_fragment_A(make_tensor(make_smem_ptr(shared_.q), typename T::LayoutQ{}));
    const Tensor k = slice_qk.partition_fragment_B(make_tensor(make_smem_ptr(shared_.kv), typename T::LayoutK{}));
    const Tensor v = slice_pv.partition_fragment_B(make_tensor(make_smem_ptr(shared_.kv), typename T::LayoutVt{}));
    Tensor s = partition_fragment_C(mma_qk, Shape<Int<T::kRows>, Int<T::kKvBlock>>{});
    Tensor o = partition_fragment_C(mma_pv, Shape<Int<T::kRows>, Int<T::kHeadDim>>{});
    Tensor probs = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<T::kKvBlock / 16>>>{});
    const auto convert_probs = [&] {
      using Convert = cutlass::NumericArrayConverter<Element, float, decltype(size(s))::value>;
      using In = typename Convert::source_type;
      using Out = typename Convert::result_type;
      *reinterpret_cast<Out*>(probs.data()) = Convert{}(*reinterpret_cast<const In*>(s.data()));
    };

    const auto start_scores = [&](int k_buffer) {
      forget(tile_);  // with three warpgroups there is no register for where its Q lies
      issue(mma_qk, q(_, _, _, tile_ % T::kQStages), k(_, _, _, k_buffer), s, GMMA::ScaleOut::Zero);
    };
    // The first of a tile overwrites the output of the one before: clearing that would be code that runs once a tile.
    auto scale_out = GMMA::ScaleOut::Zero;
    const auto start_output = [&](int v_buffer) {
      issue(mma_pv, probs, v(_, _, _, v_buffer), o, scale_out);
      scale_out = GMMA::ScaleOut::One;
    };
    ThreadSoftmax softmax;
    int k_buffer, v_buffer;  // the next block's keys, and the values of the block before it
    const auto start_products = [&] {
      turns_.begin();
      start_scores(k_buffer);
      if constexpr (T::kRescalesBetween) softmax.rescale(o);
      start_output(v_buffer);
      turns_.end();
    };
    // Scores to probabilities, relative to the running maximum. A wait for a buffer is a branch, across which the
    // compiler moves nothing; the two waits stand where that keeps a good order: the exponentials of row 0 beside the
    // maximum of row 1, and the wait for the second product behind the first half of the softmax.
    const auto absorb_scores = [&] {
      const typename T::BlockInfo info = shared_.info[k_buffer];
      shared_.kv_empty[k_buffer].arrive();
      if (info.hidden != Hidden::kNone)
        apply_mask(s, piece().view, info.hidden == Hidden::kLater, p_.group_inverse, warpgroup_, info.kv_begin);
      softmax.raise_maximum(s, 0, scale_log2_);
      k_buffer = await_next();
      softmax.exponentiate(s, 0, scale_log2_);
      softmax.raise_maximum(s, 1, scale_log2_);
      v_buffer = await_next();
      softmax.exponentiate(s, 1, scale_log2_);
    };

    if (!await_tile()) return;
    if (warpgroup_ == T::kWarpgroups - 1) turns_.end();  // the first turn
    k_buffer = await_next();
    start_scores(k_buffer);
    finish<0>(s);
    absorb_scores();
    convert_probs();

    int32_t left = blocks_left();  // of the tile; -1: its last second product ran beside the next tile's first block
    if (left > 0) clear_past(slot(), v_buffer);
    for (;;) {
      if (left == 0) {  // the next block is another tile's
        keep(softmax);
        const bool cleared = blocks_left() > 0;
        ++tile_;
        const bool more = await_tile();
        if (!cleared) clear_past(slot(-1), v_buffer);
        if (!more) break;
        if (!goes_on()) softmax.restart();
      }
      do {  // one loop for all blocks: code that runs once a tile is not in the instruction cache
        const int v_used = v_buffer;
        start_products();
        finish<1>(s);
        absorb_scores();
        finish<0>(o);
        shared_.kv_empty[v_used].arrive();
        convert_probs();
        if constexpr (!T::kRescalesBetween) softmax.rescale(o, left > 0);
      } while (--left > 0);
      if (left == 0) continue;
      store(o);
      shared_.work_empty[slot(-1)].arrive();
      if (!goes_on())
        scale_out = GMMA::ScaleOut::Zero;
      else if constexpr (!T::kRescalesBetween)
        softmax.rescale(o);
      left = blocks_left();
      if (left > 0) clear_past(slot(), v_buffer);
    }
    if constexpr (T::kRescalesBetween) softmax.rescale(o);
    start_output(v_buffer);
    finish<0>(o);
    store(o);
  }

 private:
  // All scores of the tile are in: its Q is needed no more, and its rows' states stay in shared memory meanwhile.
  CUTLASS_DEVICE void keep(const ThreadSoftmax& softmax) {
    const int stage = tile_ % T::kQStages;
    const uint32_t thread = thread_anew<T>();
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const SoftmaxState state = softmax.state(r, scale_log2_);
      if (thread % 4 == 0) shared_.states[stage * T::kRows + thread_row(warpgroup_, r, thread)] = state;
    }
    __syncwarp();
    if constexpr (!T::kMixes) shared_.q_empty[stage].arrive();
  }

  // The output of the tile before.
  template <class Output>
  CUTLASS_DEVICE void store(const Output& o) {
    const int stage = (tile_ - 1) % T::kQStages;
    const SoftmaxState* states = shared_.states + stage * T::kRows;
    // Waits until the tile before this one has left: this one's output takes its place, and, staged or not, the next
    // one's states take that of its states.
    if constexpr (T::kOwnPlace) shared_.out_empty.wait(tile_ % 2);
    if (T::kMixes || (T::kStagesOutput && shared_.staged[slot(-1)]))
      stage_rows<T>(shared_, stage, warpgroup_, states, o);
    else if constexpr (!T::kMixes)
      store_rows<T>(p_, piece(-1), warpgroup_, states, o);
    if constexpr (T::kStagesOutput) shared_.out_full[stage % T::kOutStages].arrive();
  }

  // Of the tile whose scores are being computed, or of the one before it (-1).
  CUTLASS_DEVICE int slot(int before = 0) const { return (tile_ + before) % T::kWorkSlots; }
  CUTLASS_DEVICE const typename T::Work& piece(int before = 0) const { return shared_.work[slot(before)]; }

  // Does the piece go on with the softmax and the output of the one before it, as the second part of a mixture's tile?
  CUTLASS_DEVICE bool goes_on() const {
    if constexpr (T::kMixes) return !piece().is_first;
    return false;
  }

  // Key blocks of the tile after its first.
  CUTLASS_DEVICE int32_t blocks_left() const { return piece().span.end - piece().span.begin - 1; }

  // Waits for a tile and its queries; false: there is none.
  CUTLASS_DEVICE bool await_tile() {
    shared_.work_full[slot()].wait(tile_ / T::kWorkSlots % 2);
    if (piece().view.tile.seq < 0) return false;
    shared_.q_full[tile_ % T::kQStages].wait(tile_ / T::kQStages % 2);
    return true;
  }

  // The next buffer in the order of the loader, full.
  CUTLASS_DEVICE int await_next() {
    const int i = ring_.index;
    shared_.kv_full[i].wait(ring_.phase);
    ring_.advance();
    return i;
  }

  // Rows of V past the end of the sequence hold anything, NaN included, and 0 * NaN is NaN. Only the last key block,
  // which comes first, has such rows. Every warpgroup clears them all for itself: no need to wait for another.
  CUTLASS_DEVICE void clear_past(int work_slot, int v_buffer) {
    const int32_t past = shared_.past[work_slot];
    if (past <= 0) return;
    constexpr int kChunks = T::kSlab / 8;  // of 16 bytes in a row of a slab
    typename T::Element* block = shared_.kv + v_buffer * T::kBufferElements;
    for (int32_t i = (T::kKvBlock - past) * kChunks + int32_t(threadIdx.x % 128); i < T::kKvBlock * kChunks; i += 128)
      CUTE_UNROLL
    for (int s = 0; s < T::kSlabs; ++s)
      reinterpret_cast<uint4*>(block + s * T::kKvBlock * T::kSlab)[i] = uint4{0, 0, 0, 0};
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, Turns<T>::kPrivate + warpgroup_);
  }

  const KernelParams& p_;
  typename T::Shared& shared_;
  const int warpgroup_;
  const Turns<T> turns_;
  const float scale_log2_;
  Ring<T::kBuffers> ring_;
  uint32_t tile_ = 0;  // how many have come before
};

}  // namespace flux::cuda::sm90
