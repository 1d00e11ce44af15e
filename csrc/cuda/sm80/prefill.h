// Attention over tiles of 64 or 128 rows: the warps share the keys, each has 16 or 32 rows of its own.
//
// Keys and values arrive in turn (K0, V0, K1, V1, ...) in a ring of kSlots tiles, so that one barrier per product is
// enough and the next tiles load while this one is multiplied (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "cuda/epilogue.h"
#include "cuda/sm80/fragments.h"
#include "cuda/worker.h"

namespace flux::cuda::sm80 {

template <typename T_, int kDim_, int kRows_>
struct Prefill {
  using T = T_;
  static constexpr int kDim = kDim_, kRows = kRows_, kWarps = kDim > 64 ? kRows / 16 : 4, kThreads = 32 * kWarps;
  static constexpr int kKeys = 64;
  static constexpr int kRowTiles = kRows / (16 * kWarps);  // per warp
  static constexpr int kSlots = kDim > 128 ? 2 : 3;        // 99 KB, what every GPU since 8.0 has
  static constexpr int kSmemBytes = 2 * kDim * (kRows + kSlots * kKeys);
  static constexpr int kMinBlocks = kDim > 128 || kWarps > 4 ? 1 : 2;

  using Tile = SmemTile<kDim>;
  using Out = float[kRowTiles][kDim / 8][4];

  static __device__ void load_queries(const AttendParams& p, const TileView& v, Tile q) {
    const int32_t valid = valid_rows(p, v);
    for (int index = threadIdx.x; index < kRows * Tile::kChunks; index += kThreads) {
      const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const bool inside = row < valid && chunk * 8 < p.head_dim;
      const T* source = inside ? q_row<T>(p, v, tile_row(p, v, row)) + chunk * 8 : static_cast<const T*>(p.q.data);
      cp_async16(q.at(row, chunk), source, inside ? 16 : 0);
    }
  }

  // Rounded outputs go through the warp's own rows of Q's memory, to leave in rows of 16-byte pieces.
  static __device__ void write_final(const AttendParams& p, const TileView& v, Tile q, Out& out,
                                     const SoftmaxState (&state)[2 * kRowTiles]) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * kRowTiles;
    const int32_t valid = valid_rows(p, v);
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int row = first + r / 2 * 16 + r % 2 * 8 + lane / 4;
      const TileRow at = tile_row(p, v, row);
      const RowNorm norm(v, at, state[r]);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const uint32_t pair = pack<T>(norm(out[r / 2][n][r % 2 * 2]), norm(out[r / 2][n][r % 2 * 2 + 1]));
        store_shared(q.at(row, n) + lane % 4 * 4, pair);
      }
      if (row < valid && lane % 4 == 0) lse_at(p, v, at) = state[r].lse();
    }
    __syncwarp();
    for (int index = lane; index < 16 * kRowTiles * Tile::kChunks; index += 32) {
      const int row = first + index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (row >= valid || chunk * 8 >= p.head_dim) continue;
      *reinterpret_cast<uint4*>(out_row<T>(p, v, tile_row(p, v, row)) + chunk * 8) = load_shared(q.at(row, chunk));
    }
  }

  static __device__ void write_partial(const Partials& partials, int32_t slot, int32_t valid, Out& out,
                                       const SoftmaxState (&state)[2 * kRowTiles]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int row = threadIdx.x / 32 * 16 * kRowTiles + r / 2 * 16 + r % 2 * 8 + lane / 4;
      if (row >= valid) continue;
      float* to = partials.out_row(slot, row) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        if (n * 8 < partials.head_dim)
          *reinterpret_cast<float2*>(to + n * 8) = {out[r / 2][n][r % 2 * 2], out[r / 2][n][r % 2 * 2 + 1]};
      if (lane % 4 == 0) partials.state_of(slot, row) = state[r];
    }
  }

  static __device__ void run(const AttendParams& p, const Partials& partials, const Piece& piece, uint32_t smem) {
    const TileView& v = piece.view;
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * kRowTiles;
    const Tile q{smem};
    const auto slot_tile = [&](int i) { return Tile{smem + 2 * kDim * (kRows + i % kSlots * kKeys)}; };
    const int32_t num_blocks = piece.span.end - piece.span.begin;
    using Loader = RowLoader<T, kDim, kKeys, kThreads>;
    const Loader load_keys(p, p.kv.k, v, threadIdx.x), load_values(p, p.kv.v, v, threadIdx.x);
    const TileMask masked = v.mask();
    const auto load = [&](int i) {  // tile i of the ring's sequence; always one group
      if (i < 2 * num_blocks) {
        const int32_t kv_begin = v.blocks[piece.span.begin + i / 2] * kKeys;
        if (i % 2)
          load_values(slot_tile(i), kv_begin);
        else
          load_keys(slot_tile(i), kv_begin);
      }
      cp_async_commit();
    };

    load_queries(p, v, q);  // joins the first group
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load(i);

    const SoftmaxScale scale(p.scale);
    OnlineSoftmax<2 * kRowTiles> softmax;
    Out out = {};
    for (int32_t b = 0; b < num_blocks; ++b) {
      cp_async_wait<kSlots - 2>();
      __syncthreads();
      load(2 * b + kSlots - 1);
      float scores[kRowTiles][kKeys / 8][4];
      multiply_qk<T, kRowTiles, kKeys>(scores, slot_tile(2 * b),
                                       [&](uint32_t(&a)[4], int m, int k) { q.left(a, first_row + 16 * m, 2 * k); });
      apply_sign<kRowTiles, kKeys>(scores, scale);
      const int32_t kv_begin = v.blocks[piece.span.begin + b] * kKeys;
      if (masked(kv_begin, kv_begin + kKeys))
        apply_mask<kRowTiles, kKeys>(scores, kv_begin, [&](int r) {
          return v.visible_keys((first_row + r / 2 * 16 + r % 2 * 8 + lane / 4) / p.group());
        });
      update_softmax<kRowTiles, kKeys, kDim>(softmax, scores, out, scale);

      cp_async_wait<kSlots - 2>();
      __syncthreads();
      load(2 * b + kSlots);
      multiply_pv<T, kRowTiles, kKeys>(out, scores, slot_tile(2 * b + 1));
    }
    cp_async_wait<0>();
    __syncthreads();  // Q is loaded by all warps, and its rows are about to hold the output

    SoftmaxState state[2 * kRowTiles];
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) state[r] = softmax.state(r, scale.log2);
    if (piece.final())
      write_final(p, v, q, out, state);
    else
      write_partial(partials, piece.slot, valid_rows(p, v), out, state);
  }
};

}  // namespace flux::cuda::sm80
