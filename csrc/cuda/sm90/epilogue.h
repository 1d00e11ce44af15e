// Writes the rows of a finished tile: normalised output and log-sum-exp, or a partial of a cut tile.
#pragma once

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
CUTLASS_DEVICE void store_rows(const KernelParams& p, const Piece& piece, int warpgroup, const ThreadSoftmax& softmax,
                               float scale_log2, const Output& o) {
  using Element = typename T::Element;
  const AttendParams& a = p.attend;
  const int32_t dim = a.head_dim, lane = int32_t(threadIdx.x % 4);
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    const SoftmaxState state = softmax.state(r, scale_log2);
    const int32_t row = thread_row(warpgroup, r);
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
