// The attend kernel of this family around one tile's work (decode.h, prefill.h), and its launch: definitions of
// kernels.h.
#pragma once

#include <atomic>

#include "cuda/dependent_launch.h"
#include "cuda/plan.h"
#include "cuda/sm80/decode.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/prefill.h"

namespace flux::cuda::sm80 {

// What a block plans with, in the shared memory that keys and values fill later.
struct InlineScratch {
  InlineLine line;
  TileView views[kInlineTiles];
};

// A block's share of a problem that plans_inline, from before the wait on. (The next kernel may start only after it:
// combine reads lengths and routes before it waits for this one.)
template <typename Body>
__device__ void attend_inline(const AttendParams& p, const TileShape& tile, const Partials& partials,
                              WorkerState& shared) {
  const int32_t num_tiles = p.shape.batch * p.shape.num_kv_heads, worker = blockIdx.x;
  WorkRange range;
  const auto begin_with = [&](const TileView& view) {
    shared.plan.range = range;  // costs no registers there
    shared.piece = piece_of(view, range, worker, range.tile);
  };
  if (num_tiles <= kWarpTiles) {
    const int32_t lane = threadIdx.x % 32;
    const Tile lane_tile = inline_tile(p.shape, lane);
    work_out(lane_tile.seq);
    wait_for_previous();
    let_next_start();
    TileView view;
    if (lane < num_tiles) view = view_tile(p.shape, tile, lane_tile);
    range = share_of_warp(tile_cost(view), num_tiles, worker, gridDim.x);
    if (empty(range)) return;
    if (int32_t(threadIdx.x) == range.tile) begin_with(view);
  } else {
    wait_for_previous();
    let_next_start();
    static_assert(sizeof(InlineScratch) <= Body::kSmemBytes);
    auto& scratch = *reinterpret_cast<InlineScratch*>(shared_memory());
    line_up<Body::kThreads>(p.shape, tile, gridDim.x, scratch.line,
                            [&](int32_t t, const TileView& view) { scratch.views[t] = view; });
    range = share_of(scratch.line, num_tiles, worker);
    if (empty(range)) return;
    if (threadIdx.x == 0) begin_with(scratch.views[range.tile]);
  }
  int32_t t = range.tile;
  for (;;) {
    __syncthreads();
    Body::run(p, partials, shared.piece, shared_address(shared_memory()));
    __syncthreads();
    if (++t >= tiles_end(shared.plan.range)) break;
    if (threadIdx.x == 0)
      shared.piece = piece_of(view_tile(p.shape, tile, inline_tile(p.shape, t)), shared.plan.range, worker, t);
  }
}

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    attend_kernel(const __grid_constant__ AttendParams p, const int32_t q_tokens, const bool inline_plan,
                  const __grid_constant__ PlanView plan, const __grid_constant__ Partials partials) {
  const TileShape tile{q_tokens, Body::kKeys};                         // a constant spares divisions
  __shared__ __align__(16) unsigned char worker[sizeof(WorkerState)];  // its members have initial values
  auto& state = *reinterpret_cast<WorkerState*>(worker);
  touch(p, plan, partials);
  if constexpr (Body::kRows == kDecodeRows) {
    if (inline_plan) {
      attend_inline<Body>(p, tile, partials, state);
      return;
    }
  }
  wait_for_previous();
  let_next_start();
  if (threadIdx.x == 0) {
    const PlanHeader header = *plan.header;
    state.plan = {header, first_range(plan, header)};
  }
  __syncthreads();
  for_each_piece(plan, p.shape, tile, state,
                 [&](const Piece& piece) { Body::run(p, partials, piece, shared_address(shared_memory())); });
}

// Calls use(Body{}) for the kernel that a configuration names.
template <int kDim, typename Use>
auto with_body(DType dtype, int32_t tile_rows, Use use) {
  const auto typed = [&](auto element) {
    using T = decltype(element);
    if (tile_rows == kDecodeRows) return use(Decode<T, kDim>{});
    if constexpr (prefill_rows(kDim) != kSmallRows)
      if (tile_rows != kSmallRows) return use(Prefill<T, kDim, prefill_rows(kDim)>{});
    return use(Prefill<T, kDim, kSmallRows>{});
  };
  return dtype == DType::kFloat16 ? typed(__half{}) : typed(__nv_bfloat16{});
}

template <int kDim>
bool Kernels<kDim>::configure(const AttendParams& p, const Device& device, AttendConfig* c) {
  const int32_t group = p.shape.group();
  const int64_t rows = most_rows(p.shape);
  c->arch = Arch::kSm80;
  c->tile_rows = rows <= kDecodeRows ? kDecodeRows : rows <= kSmallRows ? kSmallRows : prefill_rows(kDim);
  while (c->tile_rows < group) {
    if (c->tile_rows >= prefill_rows(kDim)) return false;
    c->tile_rows = c->tile_rows == kDecodeRows ? kSmallRows : prefill_rows(kDim);
  }
  return with_body<kDim>(p.dtype, c->tile_rows, [&](auto body) {
    using Body = decltype(body);
    c->tile = {q_tokens_of(p.shape, c->tile_rows), Body::kKeys};
    static std::atomic<int> known[64];  // blocks per multiprocessor, by device: asking takes microseconds
    std::atomic<int>& cached = known[device.index % 64];
    int blocks = device.index < 64 ? cached.load() : 0;
    const auto kernel = attend_kernel<Body>;
    if (blocks == 0 &&
        (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes) != cudaSuccess ||
         cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Body::kThreads, Body::kSmemBytes) !=
             cudaSuccess))
      return false;
    if (device.index < 64) cached = blocks;
    c->num_workers = blocks * device.num_sms;
    c->inline_plan = c->tile_rows == kDecodeRows && plans_inline(p.shape, *c);
    return blocks > 0;
  });
}

template <int kDim>
cudaError_t Kernels<kDim>::attend(const AttendParams& p, const AttendConfig& c, const Workspace& w,
                                  cudaStream_t stream) {
  return with_body<kDim>(p.dtype, c.tile_rows, [&](auto body) {
    using Body = decltype(body);
    return launch(attend_kernel<Body>, dim3(c.num_workers), Body::kThreads, Body::kSmemBytes, stream, c.overlap, p,
                  c.tile.q_tokens, c.inline_plan, w.plan, w.partials);
  });
}

}  // namespace flux::cuda::sm80
