// Writes the rows of a finished tile: normalised output and log-sum-exp, or a partial of a cut tile.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/epilogue.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/thread_rows.h"
#include "cuda/sm90/traits.h"

namespace flux::cuda::sm90 {

// Lane t of a quad holds word t of four 16-byte chunks; afterwards it holds all of chunk t.
CUTLASS_DEVICE uint4 transpose_quad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const auto permute = [&] {  // w[i] <- w[i ^ t]
    const uint32_t a0 = odd ? w1 : w0, a1 = odd ? w0 : w1, a2 = odd ? w3 : w2, a3 = odd ? w2 : w3;
    w0 = high ? a2 : a0, w1 = high ? a3 : a1, w2 = high ? a0 : a2, w3 = high ? a1 : a3;
  };
  permute();
  w1 = __shfl_xor_sync(~0u, w1, 1);
  w2 = __shfl_xor_sync(~0u, w2, 2);
  w3 = __shfl_xor_sync(~0u, w3, 3);
  permute();
  return {w0, w1, w2, w3};
}

template <class T, class Output>
CUTLASS_DEVICE void store_rows(const KernelParams& p, const Piece& piece, int warpgroup, const SoftmaxState* states,
                               const Output& o) {
  using Element = typename T::Element;
  const AttendParams& a = p.attend;
  const uint32_t thread = thread_anew<T>();
  const int32_t dim = a.head_dim, lane = int32_t(thread % 4);
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    const int32_t row = thread_row(warpgroup, r, thread);
    const SoftmaxState state = states[row];
    const bool valid = row < valid_rows(a, piece.view);
    if (piece.span.split) {
      if (valid && lane == 0) p.partials.state_of(piece.slot, row) = state;
      float* out = p.partials.out_row(piece.slot, row) + 2 * lane;
      CUTE_UNROLL
      for (int j = 0; j < T::kHeadDim / 8; ++j)
        if (valid && 8 * j < dim) *reinterpret_cast<float2*>(out + 8 * j) = {o(4 * j + 2 * r), o(4 * j + 2 * r + 1)};
      continue;
    }
    const TileRow where = tile_row(a, piece.view, row);
    if (valid && lane == 0) lse_at(a, piece.view, where) = state.lse();
    Element* out = out_row<Element>(a, piece.view, where) + 8 * lane;
    const RowNorm norm(piece.view, where, state);
    CUTE_UNROLL
    for (int j = 0; j < T::kHeadDim / 8; j += 4) {
      uint32_t word[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (j + i) + 2 * r;
        word[i] = pack<typename T::PackedElement>(norm(o(at)), norm(o(at + 1)));
      }
      const uint4 chunk = transpose_quad(word[0], word[1], word[2], word[3]);
      if (valid && 8 * (j + lane) < dim) *reinterpret_cast<uint4*>(out + 8 * j) = chunk;
    }
  }
}

// The output of a whole tile, all of whose rows are queries that see a key, leaves through shared memory: few
// instructions for the consumers. They write their rows as TMA wants them.
template <class T>
CUTLASS_DEVICE bool leaves_staged(const KernelParams& p, const Piece& piece) {
  return T::kStagesOutput && !piece.span.split && piece.view.q_rows.size() == p.tile.q_tokens && piece.view.sees_any(0);
}

template <class T, class Output>
CUTLASS_DEVICE void stage_rows(typename T::Shared& shared, int stage, int warpgroup, const SoftmaxState* states,
                               const Output& o) {
  // Of mixtures a warp writes the rows of Q that its own products read. That none of the warpgroup is behind in its
  // products is made sure of by the barrier of a turn since, but in a block's last tile.
  static_assert(T::kTakesTurns || !T::kMixes);
  const float factor[] = {fast_reciprocal(states[thread_row(warpgroup, 0)].sum),
                          fast_reciprocal(states[thread_row(warpgroup, 1)].sum)};
  // Lanes 0 to 15 say where 16 bytes of one of the warp's rows go, the others where those behind them go.
  constexpr int kChunks = T::kSlab / 8;  // of 16 bytes in a row of a slab
  const int row = 64 * warpgroup + int(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16);
  const int swizzle = kChunks == 8 ? row % 8 : row / 2 % 4, behind = int(threadIdx.x % 32 / 16) ^ swizzle;
  typename T::Element* place = shared.q + T::out_place(stage) * T::kQElements + row * T::kSlab;
  CUTE_UNROLL
  for (int j = 0; j < T::kHeadDim / 8; j += 2) {
    uint32_t word[4];
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i)
      word[i] = pack<typename T::PackedElement>(o(4 * j + 2 * i) * factor[i % 2], o(4 * j + 2 * i + 1) * factor[i % 2]);
    auto* chunk = place + j / kChunks * T::kRows * T::kSlab + 8 * (j % kChunks ^ behind);
    cute::SM90_U32x4_STSM_N::copy(word[0], word[1], word[2], word[3], *reinterpret_cast<cute::uint128_t*>(chunk));
  }
  cutlass::arch::fence_view_async_shared();
}

// Stores what the consumers have staged, and says when its place is free. Called by a whole warp (as `schedule`).
template <class T>
CUTLASS_DEVICE void store_staged(const KernelParams& p, typename T::Shared& shared) {
  const int32_t lane = cutlass::canonical_lane_idx();
  Ring<T::kWorkSlots> work;
  Ring<1> out;
  for (Ring<T::kQStages> stage;; work.advance(), stage.advance(), out.advance()) {
    shared.work_full[work.index].wait(work.phase);
    const TileView& view = shared.work[work.index].view;
    if (view.tile.seq < 0) break;
    shared.out_full[0].wait(out.phase);
    if (shared.staged[work.index]) {
      if (lane == 0) {
        const int32_t seq = p.attend.out.stride.b == 0 ? 0 : view.tile.seq;
        CUTE_UNROLL
        for (int32_t s = 0; s < T::kSlabs; ++s)
          cute::SM90_TMA_STORE_4D::copy(&p.out_map,
                                        shared.q + T::out_place(stage.index) * T::kQElements + s * T::kRows * T::kSlab,
                                        s * T::kSlab, view.tile.kv_head * p.group, view.q_rows.begin, seq);
        cute::tma_store_arrive();
      }
      for (int32_t row = lane; row < valid_rows(p.attend, view); row += 32)
        lse_at(p.attend, view, tile_row(p.attend, view, row)) = shared.states[stage.index * T::kRows + row].lse();
      if (lane == 0) cute::tma_store_wait<0>();
      __syncwarp();
    }
    shared.out_empty.arrive();
    shared.work_empty[work.index].arrive();
    __syncwarp();
  }
}

// Rows of a tile that sees no key. Called by a whole warp.
template <class T>
CUTLASS_DEVICE void store_empty(const AttendParams& a, const TileView& view) {
  const int32_t lane = int32_t(threadIdx.x % 32);
  for (int32_t r = 0; r < valid_rows(a, view); ++r) {
    const TileRow where = tile_row(a, view, r);
    if (8 * lane < a.head_dim)
      *reinterpret_cast<uint4*>(out_row<typename T::Element>(a, view, where) + 8 * lane) = uint4{0, 0, 0, 0};
    if (lane == 0) lse_at(a, view, where) = -INFINITY;
  }
}

}  // namespace flux::cuda::sm90
