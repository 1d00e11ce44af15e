// Mixtures on Hopper: the kernel of prefill (kernel.h), whose pieces are the parts of tiles (core/mixture_parts.h). The
// second part of a tile follows the first, and goes on with its softmax and output.
//
// Either part has its Q, in whose place the consumers leave what they have at its end: after the first part that is the
// sparse branch's output, after the last the full one's. Two warps store it, and read the sparse branch's back for the
// mixture: that costs the consumers nothing.
#pragma once

#include "cuda/mix_backward.h"
#include "cuda/sm90/kernel.h"
#include "cuda/sm90/mix_kernels.h"

namespace flux::cuda::sm90 {

// A part of a tile, whole. A tile has one part at least.
struct TilePart {
  PartView view;
  TileSpan span;
  bool is_first, is_last;
};

template <class Element, int kHeadDim>
using MixTraits = Traits<Element, kHeadDim, kMixRows / 64, kMixKeys, TilePart>;

// Rows of which the sparse branch, or both, see no key. Called by a whole warp.
template <class T>
CUTLASS_DEVICE void store_none(const MixKernelParams& p, const TileView& view, bool both) {
  const AttendParams& a = p.attend;
  const Mixture& m = p.mixture;
  const int32_t lane = int32_t(threadIdx.x % 32);
  const uint4 none{0, 0, 0, 0};
  const uint4 mixed = mix_chunk<typename T::PackedElement>(none, none, m.weight_of(view.tile.seq, view.tile.kv_head));
  for (int32_t r = 0; r < valid_rows(a, view); ++r) {
    const TileRow where = tile_row(a, view, r);
    const auto write = [&](const MutableView& to, const uint4& chunk) {
      if (8 * lane >= a.head_dim) return;
      auto* row = static_cast<typename T::Element*>(to.data) + row_offset(to.stride, view, where);
      *reinterpret_cast<uint4*>(row + 8 * lane) = chunk;
    };
    write(m.sparse_out, none);
    if (lane == 0) m.sparse_lse[row_offset(a.lse_stride, view, where)] = -INFINITY;
    if (!both) continue;
    write(a.out, none), write(m.mixed, mixed);
    if (lane == 0) lse_at(a, view, where) = -INFINITY;
  }
}

// As `schedule` (load.h), of whole tiles that a counter hands out.
template <class T>
CUTLASS_DEVICE void schedule_parts(const MixKernelParams& p, typename T::Shared& shared) {
  const bool leader = cutlass::canonical_lane_idx() == 0;
  Ring<T::kWorkSlots> ring;
  Ring<1> wanted;
  const auto publish = [&](const TilePart& part) {
    shared.work_empty[ring.index].wait(ring.phase ^ 1);
    if (leader) {
      shared.work[ring.index] = part;
      shared.work_full[ring.index].arrive();
    }
    __syncwarp();
    ring.advance();
  };
  const AttendParams& a = p.attend;
  for (uint32_t item = blockIdx.x; item < p.tiles.total();
       item = gridDim.x + __shfl_sync(~0u, leader ? atomicAdd(p.next_item, 1) : 0, 0)) {
    const Tile at = find_tile(a, p.tiles, item);
    if (at.q_block < 0) continue;
    const TileView tile = view_tile(a, p.tiles.shape, at);
    const bool has_sparse = part_blocks(tile, kSparsePart, T::kKvBlock).size() > 0;
    const bool has_rest = part_blocks(tile, kRestPart, T::kKvBlock).size() > 0;
    if (!has_sparse) store_none<T>(p, tile, !has_rest);
    for (int32_t n = has_sparse ? kSparsePart : kRestPart; n < (has_rest ? kParts : kRestPart); ++n) {
      TilePart part{{tile, Part(n), T::kKvBlock}, {}, n == kSparsePart || !has_sparse, n == kRestPart || !has_rest};
      part.span = {0, part.view.blocks.size(), false};
      publish(part);
      shared.work_wanted.wait(wanted.phase);
      wanted.advance();
    }
  }
  TilePart end{};
  end.view.tile.seq = -1;
  publish(end);
}

// Stores the rows of a consumer warpgroup that are staged, of either branch, and the mixture of both; then says that
// their part of Q's place is free. Called by a whole warp. Where rows lie is worked out by a lane a row, and handed
// round: worked out wherever a row is copied, it took longer than the products of a short part.
template <class T>
CUTLASS_DEVICE void store_parts(const MixKernelParams& p, typename T::Shared& shared, int warpgroup) {
  using Element = typename T::Element;
  using Packed = typename T::PackedElement;
  const AttendParams& a = p.attend;
  const Mixture& m = p.mixture;
  // A lane has one 16-byte chunk of every kStep-th row, kAtOnce rows at a time: so many of the sparse branch's come
  // back together, to the lane that wrote them.
  constexpr int kColumns = T::kHeadDim <= 64 ? 8 : 16, kStep = 32 / kColumns, kAtOnce = T::kHeadDim == 96 ? 2 : 4;
  constexpr int kChunks = T::kSlab / 8;  // of a row of a slab
  const int32_t lane = cutlass::canonical_lane_idx(), chunk = lane % kColumns;
  const bool has_column = 8 * chunk < a.head_dim;
  Ring<T::kWorkSlots> work;
  for (Ring<T::kQStages> stage;; work.advance(), stage.advance()) {
    shared.work_full[work.index].wait(work.phase);
    const TilePart& part = shared.work[work.index];
    const PartView& v = part.view;
    if (v.tile.seq < 0) break;
    shared.out_full[stage.index].wait(stage.phase);
    const bool sparse_ends = v.part == kSparsePart, is_last = part.is_last, reads = !sparse_ends && !part.is_first;
    const int32_t valid = valid_rows(a, v);
    const Element* const staged = shared.q + stage.index * T::kQElements + chunk / kChunks * T::kRows * T::kSlab;
    for (int32_t begin = 64 * warpgroup; begin < 64 * (warpgroup + 1); begin += 32) {
      const int32_t own = begin + lane, token = token_of_row(own, p.group_inverse);
      const TileRow at{token, v.tile.kv_head * p.group + own - token * p.group};
      const int64_t from_start = row_offset(a.out.stride, v, at);  // of all outputs: they lie alike
      const uint32_t sees_sparse = __ballot_sync(~0u, v.sees_any(token)),
                     sees_any = __ballot_sync(~0u, v.q_pos + token >= 0);
      if (own < valid) {
        const float lse = shared.states[stage.index * T::kRows + own].lse();
        if (sparse_ends) m.sparse_lse[row_offset(a.lse_stride, v, at)] = lse;
        if (is_last) lse_at(a, v, at) = lse;
      }
      const auto chunk_of = [&](const MutableView& to, int64_t offset) {
        return reinterpret_cast<uint4*>(static_cast<Element*>(to.data) + offset + 8 * chunk);
      };
      for (int32_t first = lane / kColumns; first < 32; first += kAtOnce * kStep) {
        uint4 sparse[kAtOnce];
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t row = first + i * kStep;
          sparse[i] = uint4{0, 0, 0, 0};
          if (!reads) continue;
          const int64_t offset = __shfl_sync(~0u, from_start, row);
          if (begin + row < valid && has_column) sparse[i] = *chunk_of(m.sparse_out, offset);
        }
        CUTE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t row = first + i * kStep, of_tile = begin + row;
          const int swizzle = kChunks == 8 ? row % 8 : row / 2 % 4;
          const int64_t offset = __shfl_sync(~0u, from_start, row);
          if (of_tile >= valid || !has_column) continue;
          uint4 out = *reinterpret_cast<const uint4*>(staged + of_tile * T::kSlab + 8 * (chunk % kChunks ^ swizzle));
          if (sparse_ends) {
            sparse[i] = sees_sparse >> row & 1 ? out : uint4{0, 0, 0, 0};
            *chunk_of(m.sparse_out, offset) = sparse[i];
          }
          if (!is_last) continue;
          if (!(sees_any >> row & 1)) out = uint4{0, 0, 0, 0};
          *chunk_of(a.out, offset) = out;
          *chunk_of(m.mixed, offset) = mix_chunk<Packed>(out, sparse[i], m.weight_of(v.tile.seq, v.tile.kv_head));
        }
      }
    }
    // Every lane for itself: racecheck does not follow one that speaks for the others.
    shared.q_empty[stage.index].arrive();
    shared.work_empty[work.index].arrive();
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) mix_kernel(const __grid_constant__ MixKernelParams p) {
  extern __shared__ __align__(1024) char raw[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(raw);
  const int warpgroup = cutlass::canonical_warp_group_idx(), warp = cutlass::canonical_warp_idx_sync();
  if (threadIdx.x == 0) init_barriers<T>(shared);
  __syncthreads();
  wait_for_previous();
  let_next_start();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegs>();
    if (warp >= 2)
      store_parts<T>(p, shared, warp - 2);
    else if (warp == 0)
      schedule_parts<T>(p, shared);
    else if (cute::elect_one_sync())
      Loader<T>(p, shared).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kMathRegs>();
    Consumer<T>(p, shared, warpgroup - 1).run();
  }
}

template <DType kDType, int kHeadDim>
cudaError_t launch_mix(const MixKernelParams& p, const Device& device, cudaStream_t stream) {
  using Element = std::conditional_t<kDType == DType::kFloat16, cutlass::half_t, cutlass::bfloat16_t>;
  using T = MixTraits<Element, kHeadDim>;
  const auto kernel = mix_kernel<T>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes))
    return e;
  return cuda::launch(kernel, dim3(device.num_sms), T::kThreads, T::kSharedBytes, stream, device.overlap, p);
}

}  // namespace flux::cuda::sm90
