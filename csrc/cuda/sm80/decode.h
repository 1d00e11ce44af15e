// Attention over tiles of 16 rows, bound by memory: every warp takes its own 16 keys of each block, with its own ring
// of stages and no barrier among warps until the tile's end, where their results are merged.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/sm80/fragments.h"
#include "cuda/worker.h"

namespace flux::cuda::sm80 {

template <typename T_, int kDim_>
struct Decode {
  using T = T_;
  static constexpr int kDim = kDim_, kRows = 16, kWarps = kDim > 128 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kWarpKeys = 16, kKeys = kWarpKeys * kWarps;
  static constexpr int kStages = kDim > 64 ? 3 : 4;
  static constexpr int kStageBytes = 2 * 2 * kDim * kWarpKeys;  // keys and values
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kSmemBytes = kWarps * kWarpBytes;
  static constexpr int kMinBlocks = 2;
  static_assert(kWarpBytes >= int(sizeof(float)) * kRows * kDim, "the merge reuses the ring");

  using Tile = SmemTile<kDim>;
  using Out = float[1][kDim / 8][4];

  // Q stays in registers, straight from memory: lane l holds columns 2 (l % 4) of rows l / 4 and l / 4 + 8.
  static __device__ void load_queries(const AttendParams& p, const TileView& v, uint32_t (&q)[kDim / 16][4]) {
    const int lane = threadIdx.x % 32;
    const int32_t valid = valid_rows(p, v);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < kDim / 8; ++k) q[k / 2][k % 2 * 2 + half] = 0;
      const int row = lane / 4 + 8 * half;
      if (row >= valid) continue;
      const T* source = q_row<T>(p, v, tile_row(p, v, row)) + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < kDim / 8; ++k)
        if (k * 8 < p.head_dim) q[k / 2][k % 2 * 2 + half] = *reinterpret_cast<const uint32_t*>(source + k * 8);
    }
  }

  static __device__ void run(const AttendParams& p, const Partials& partials, const Piece& piece, uint32_t smem) {
    __shared__ __align__(8) unsigned char warp_memory[kWarps * kRows * sizeof(SoftmaxState)];
    const auto state_of = [&](int w, int row) -> SoftmaxState& {
      return reinterpret_cast<SoftmaxState*>(warp_memory)[w * kRows + row];
    };
    const TileView& v = piece.view;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t ring = smem + warp * kWarpBytes;
    const int32_t num_blocks = piece.span.end - piece.span.begin;
    const auto keys_of = [&](int stage) { return Tile{ring + stage * kStageBytes}; };
    const auto values_of = [&](int stage) { return Tile{ring + stage * kStageBytes + kStageBytes / 2}; };
    const auto kv_begin_of = [&](int32_t b) { return v.blocks[piece.span.begin + b] * kKeys + warp * kWarpKeys; };
    using Loader = RowLoader<T, kDim, kWarpKeys, 32>;
    const Loader load_keys(p, p.kv.k, v, lane), load_values(p, p.kv.v, v, lane);
    const auto load = [&](int32_t b, int stage) {
      if (b < num_blocks) {
        const int32_t kv_begin = kv_begin_of(b);
        load_keys(keys_of(stage), kv_begin);
        load_values(values_of(stage), kv_begin);
      }
      cp_async_commit();
    };
#pragma unroll 1  // every instruction runs about once in a short step: what counts is how many must be fetched
    for (int s = 0; s < kStages - 1; ++s) load(s, s);

    uint32_t q[kDim / 16][4];
    load_queries(p, v, q);
    const TileMask masked = v.mask();
    const SoftmaxScale scale(p.scale);
    OnlineSoftmax<2> softmax;
    Out out = {};
    int stage = 0;
    for (int32_t b = 0; b < num_blocks; ++b) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // and all lanes are done with the stage that is loaded next
      load(b + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
      float scores[1][kWarpKeys / 8][4];
      multiply_qk<T, 1, kWarpKeys>(scores, keys_of(stage), [&](uint32_t(&a)[4], int, int k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = q[k][i];
      });
      apply_sign<1, kWarpKeys>(scores, scale);
      const int32_t kv_begin = kv_begin_of(b);
      if (masked(kv_begin, kv_begin + kWarpKeys))
        apply_mask<1, kWarpKeys>(scores, kv_begin,
                                 [&](int r) { return v.visible_keys((lane / 4 + 8 * r) / p.group()); });
      update_softmax<1, kWarpKeys, kDim>(softmax, scores, out, scale);
      multiply_pv<T, 1, kWarpKeys>(out, scores, values_of(stage));
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncwarp();

    // Warps' results to shared memory (each in its own ring), then merged.
    const auto out_of = [&](int w) { return reinterpret_cast<float*>(shared_memory() + w * kWarpBytes); };
    const int32_t valid = valid_rows(p, v);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (8 * r >= valid) break;
      const int row = lane / 4 + 8 * r;
      const SoftmaxState state = softmax.state(r, scale.log2);
      if (lane % 4 == 0) state_of(warp, row) = state;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        *reinterpret_cast<float2*>(out_of(warp) + row * kDim + n * 8 + lane % 4 * 2) = {out[0][n][2 * r],
                                                                                        out[0][n][2 * r + 1]};
    }
    __syncthreads();
    for (int index = threadIdx.x; index < kRows * kDim / 4; index += kThreads) {
      const int row = index / (kDim / 4), d = index % (kDim / 4) * 4;
      if (row >= valid) break;  // rows ascend
      if (d >= p.head_dim) continue;
      SoftmaxState states[kWarps];
      float factor[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) states[w] = state_of(w, row);
      const SoftmaxState state = merge(states, factor);
      float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 x = *reinterpret_cast<const float4*>(out_of(w) + row * kDim + d);
        sum = add_scaled(sum, x, factor[w]);
      }
      if (piece.final()) {
        const TileRow at = tile_row(p, v, row);
        const RowNorm norm(v, at, state);
        *reinterpret_cast<uint2*>(out_row<T>(p, v, at) + d) = pack_four<T>(norm, sum);
        if (d == 0) lse_at(p, v, at) = state.lse();
      } else {
        *reinterpret_cast<float4*>(partials.out_row(piece.slot, row) + d) = sum;
        if (d == 0) partials.state_of(piece.slot, row) = state;
      }
    }
  }
};

}  // namespace flux::cuda::sm80
