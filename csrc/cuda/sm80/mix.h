// Mixtures on the tensor cores of every GPU since compute capability 8.0: the walk of prefill.h over the sparse part
// and then the rest (core/mixture_parts.h); between the two the output is that of the sparse pattern.
#pragma once

#include "cuda/mix_backward.h"
#include "cuda/sm80/backward.h"
#include "cuda/sm80/mix_kernels.h"
#include "cuda/sm80/prefill.h"

namespace flux::cuda::sm80 {

template <typename T_, int kDim_>
struct Mix : Prefill<T_, kDim_, most_tile_rows(kDim_)> {
  using Base = Prefill<T_, kDim_, most_tile_rows(kDim_)>;
  using Base::kDim, Base::kKeys, Base::kRows, Base::kRowTiles, Base::kSlots, Base::kThreads;
  using typename Base::Out, typename Base::T, typename Base::Tile;
  using Softmax = OnlineSoftmax<2 * kRowTiles>;
  using Walk = typename MixedWalks::template OfRows<T>;

  // The output of the sparse branch, where its part ends. (Q's memory, through which rows could leave in larger pieces,
  // is in use.)
  static __device__ void write_sparse(const AttendParams& p, const Mixture& m, const TileView& v,
                                      const Softmax& softmax, float scale_log2, const Out& out) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * kRowTiles;
    const int32_t valid = valid_rows(p, v);
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const SoftmaxState state = softmax.state(r, scale_log2);
      const int row = first + r / 2 * 16 + r % 2 * 8 + lane / 4;
      if (row >= valid) continue;
      const TileRow at = tile_row(p, v, row);
      const RowNorm norm(v, at, state);
      T* to = static_cast<T*>(m.sparse_out.data) + row_offset(m.sparse_out.stride, v, at) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        if (n * 8 < p.head_dim)
          *reinterpret_cast<uint32_t*>(to + n * 8) =
              pack<T>(norm(out[r / 2][n][r % 2 * 2]), norm(out[r / 2][n][r % 2 * 2 + 1]));
      if (lane % 4 == 0) m.sparse_lse[row_offset(p.lse_stride, v, at)] = state.lse();
    }
  }

  // The mixture of this warp's rows, of which `q` holds the rounded outputs of the full branch.
  static __device__ void write_mixed(const AttendParams& p, const Mixture& m, const TileView& v, Tile q) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * kRowTiles;
    const int32_t valid = valid_rows(p, v);
    const float weight = m.weight_of(v.tile.seq, v.tile.kv_head);
    for (int index = lane; index < 16 * kRowTiles * Tile::kChunks; index += 32) {
      const int row = first + index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (row >= valid || chunk * 8 >= p.head_dim) continue;
      const TileRow at = tile_row(p, v, row);
      const T* sparse = static_cast<const T*>(m.sparse_out.data) + row_offset(m.sparse_out.stride, v, at) + chunk * 8;
      T* to = static_cast<T*>(m.mixed.data) + row_offset(m.mixed.stride, v, at) + chunk * 8;
      *reinterpret_cast<uint4*>(to) =
          mix_chunk<T>(load_shared(q.at(row, chunk)), *reinterpret_cast<const uint4*>(sparse), weight);
    }
  }

  static __device__ void run(const AttendParams& p, const Mixture& m, const TileView& v) {
    __shared__ Shared<Walk> shared_walk;
    const Walk& walk = shared_walk.make([&] { return Walk(v, kKeys); });
    const uint32_t smem = shared_address(shared_memory());
    const SoftmaxScale scale(p.scale);
    Softmax softmax;
    Out out = {};
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 * kRowTiles;
    const Tile q{smem};
    const auto slot_tile = [&](int i) { return Tile{smem + 2 * kDim * (kRows + i % kSlots * kKeys)}; };
    const int32_t num_blocks = walk.size();
    using Loader = RowLoader<T, kDim, kKeys, kThreads>;
    const Loader load_keys(p, p.kv.k, v, threadIdx.x), load_values(p, p.kv.v, v, threadIdx.x);
    const auto load = [&](int i) {  // tile i of the ring's sequence; always one group
      if (i < 2 * num_blocks) {
        const int32_t kv_begin = walk[i / 2] * kKeys;
        if (i % 2)
          load_values(slot_tile(i), kv_begin);
        else
          load_keys(slot_tile(i), kv_begin);
      }
      cp_async_commit();
    };

    Base::load_queries(p, v, q);  // joins the first group
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) load(i);

    for (int32_t b = 0; b < num_blocks; ++b) {
      if (b == walk.rest_begins()) write_sparse(p, m, v, softmax, scale.log2, out);
      cp_async_wait<kSlots - 2>();
      __syncthreads();
      load(2 * b + kSlots - 1);
      float scores[kRowTiles][kKeys / 8][4];
      multiply_qk<T, kRowTiles, kKeys>(scores, slot_tile(2 * b),
                                       [&](uint32_t(&a)[4], int m, int k) { q.left(a, first_row + 16 * m, 2 * k); });
      apply_sign<kRowTiles, kKeys>(scores, scale);
      const int32_t kv_begin = walk[b] * kKeys;
      const auto place = walk.place(b);
      if (walk.needs_mask(0, place, kv_begin, kv_begin + kKeys))
        apply_mask<kRowTiles, kKeys>(scores, kv_begin, [&](int r) {
          return walk.visible_keys((first_row + r / 2 * 16 + r % 2 * 8 + lane / 4) / p.group(), place);
        });
      update_softmax<kRowTiles, kKeys, kDim>(softmax, scores, out, scale);

      cp_async_wait<kSlots - 2>();
      __syncthreads();
      load(2 * b + kSlots);
      multiply_pv<T, kRowTiles, kKeys>(out, scores, slot_tile(2 * b + 1));
    }
    cp_async_wait<0>();
    __syncthreads();  // Q is loaded by all warps, and its rows are about to hold the output
    if (num_blocks == walk.rest_begins()) write_sparse(p, m, v, softmax, scale.log2, out);

    SoftmaxState state[2 * kRowTiles];
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) state[r] = softmax.state(r, scale.log2);
    TileView full = v;
    full.list = {};
    Base::write_final(p, full, q, out, state);
    write_mixed(p, m, full, q);
  }
};

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    mix_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Mixture m,
               const __grid_constant__ MixTiles tiles) {
  const Tile tile = find_tile(p, tiles, blockIdx.x);
  if (tile.q_block < 0) return;
  __shared__ Shared<TileView> view;
  Body::run(p, m, view.make([&] { return view_tile(p, {tiles.shape.q_tokens, Body::kKeys}, tile); }));
}

template <DType kDType, int kDim>
cudaError_t MixKernels<kDType, kDim>::launch(const AttendParams& p, const Mixture& m, cudaStream_t stream) {
  using Body = Mix<Element<kDType>, kDim>;
  const MixTiles tiles(p, Body::kRows, Body::kKeys);
  if (tiles.total() == 0) return cudaSuccess;
  const auto kernel = mix_kernel<Body>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes))
    return e;
  return cuda::launch(kernel, dim3(unsigned(tiles.total())), Body::kThreads, Body::kSmemBytes, stream, false, p, m,
                      tiles);
}

template <DType kDType, int kDim>
cudaError_t MixKernels<kDType, kDim>::launch_queries(const MixBackwardParams& b, const MixBackwardWorkspace& w,
                                                     cudaStream_t stream) {
  return launch_queries_backward<QueriesBackward<Element<kDType>, kDim, MixedWalks>>(b, w, stream);
}

template <DType kDType, int kDim>
cudaError_t MixKernels<kDType, kDim>::launch_keys(const MixBackwardParams& b, const MixBackwardWorkspace& w,
                                                  cudaStream_t stream) {
  return launch_keys_backward<KeysBackward<Element<kDType>, kDim, MixedWalks>>(b, w, stream);
}

}  // namespace flux::cuda::sm80
