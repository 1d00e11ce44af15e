// Definitions of kernels.h.
#pragma once

#include <atomic>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/sm80/decode.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/prefill.h"

namespace flux::cuda::sm80 {

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    attend_kernel(const __grid_constant__ AttendParams p, const TileShape tile, const PlanView plan,
                  const Partials partials, const bool inline_plan) {
  constexpr bool kPlans = Body::kRows == kDecodeRows;
  __shared__ __align__(16) unsigned char worker[sizeof(WorkerState)];  // its members have initial values
  __shared__ int32_t row_begin[kPlans ? kInlineTiles + 1 : 1];         // of an inline plan
  auto& state = *reinterpret_cast<WorkerState*>(worker);
  wait_for_previous();
  let_next_start();  // not before: the combine kernel reads lengths and routes before it waits for this one
  const bool plans = kPlans && inline_plan;
  if constexpr (kPlans) {
    static_assert(sizeof(InlineLine) <= Body::kSmemBytes, "the line is made where the keys go later");
    if (plans) {
      const BlockPlan own =
          plan_inline<Body::kThreads>(p.shape, tile, *reinterpret_cast<InlineLine*>(shared_memory()), row_begin);
      if (threadIdx.x == 0) state.plan = own;
    }
  }
  if (!plans && threadIdx.x == 0) {
    const PlanHeader header = *plan.header;
    state.plan = {header, first_range(plan, header)};
  }
  __syncthreads();
  for_each_piece(
      plan, p.shape, tile, state, [&](int32_t t) { return plans ? InlineTiles{p.shape, row_begin}(t) : plan.tiles[t]; },
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
                  c.tile, w.plan, w.partials, c.inline_plan);
  });
}

}  // namespace flux::cuda::sm80
