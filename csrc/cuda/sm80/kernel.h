// The attend kernel of this family around one tile's work (decode.h, prefill.h), and its launch: definitions of
// kernels.h.
#pragma once

#include <atomic>
#include <type_traits>

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

// All that a block does where the problem `plans_inline`. It lets combine start only after its own wait: combine reads
// lengths and routes before it waits, and the kernel before this one, which may have written them, must have ended.
template <typename Body>
__device__ void attend_inline(const AttendParams& p, const TileShape& tile, const Partials& partials,
                              WorkerState& shared) {
  const int32_t num_tiles = p.batch * p.kv.num_heads, worker = blockIdx.x;
  WorkRange range;
  const auto begin_with = [&](const TileView& view) {
    shared.plan.range = range;  // in shared memory it costs no registers
    shared.piece = piece_of(view, range, worker, range.tile);
  };
  if (num_tiles <= kWarpTiles) {
    const int32_t lane = threadIdx.x % 32;
    const Tile lane_tile = inline_tile(p, lane);
    work_out(lane_tile.seq);
    wait_for_previous();
    let_next_start();
    TileView view;
    if (lane < num_tiles) view = view_tile(p, tile, lane_tile);
    range = share_of_warp(tile_cost(view), num_tiles, worker, gridDim.x);
    if (empty(range)) return;
    if (int32_t(threadIdx.x) == range.tile) begin_with(view);
  } else {
    wait_for_previous();
    let_next_start();
    static_assert(sizeof(InlineScratch) <= Body::kSmemBytes);
    auto& scratch = *reinterpret_cast<InlineScratch*>(shared_memory());
    line_up<Body::kThreads>(p, tile, gridDim.x, scratch.line,
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
    if (threadIdx.x == 0) shared.piece = piece_of(view_tile(p, tile, inline_tile(p, t)), shared.plan.range, worker, t);
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
  for_each_piece(plan, p, tile, state,
                 [&](const Piece& piece) { Body::run(p, partials, piece, shared_address(shared_memory())); });
}

// The work on one tile: of at most kDecodeRows rows, decode.h; of more, prefill.h.
template <DType kDType, int kDim, int kRows>
using BodyOf =
    std::conditional_t<kRows == kDecodeRows, Decode<Element<kDType>, kDim>, Prefill<Element<kDType>, kDim, kRows>>;

template <typename Body>
cudaError_t launch_kernel(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  return launch(attend_kernel<Body>, dim3(c.num_workers), Body::kThreads, Body::kSmemBytes, stream, c.overlap, p,
                c.tile.q_tokens, c.inline_plan, w.plan, w.partials);
}

template <DType kDType, int kDim, int kRows>
const Instance Kernel<kDType, kDim, kRows>::instance = {
    80, kDType, kDim, kRows, BodyOf<kDType, kDim, kRows>::kKeys, launch_kernel<BodyOf<kDType, kDim, kRows>>};

template <DType kDType, int kDim, int kRows>
int Kernel<kDType, kDim, kRows>::blocks_per_multiprocessor(int device) {
  using Body = BodyOf<kDType, kDim, kRows>;
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // asking takes microseconds
  int blocks = device < kDevices ? known[device].load() : 0;
  if (blocks > 0) return blocks;
  const auto kernel = attend_kernel<Body>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Body::kThreads, Body::kSmemBytes) != cudaSuccess)
    return 0;
  if (device < kDevices) known[device] = blocks;
  return blocks;
}

}  // namespace flux::cuda::sm80
