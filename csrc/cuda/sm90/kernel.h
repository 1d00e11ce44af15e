// The persistent kernel of prefill (decode is sm80/decode.h on Hopper too): a producer warpgroup (scheduler warp, TMA
// warp) and the consumer warpgroups.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/sm90/load.h"
#include "cuda/sm90/mainloop.h"

namespace flux::cuda::sm90 {

// Every consumer thread says for itself that it is done with a buffer: an `if` for one lane of a warp is a branch in
// the main loop, which costs 2 to 9 % (docs/kernels_diary.md, v8), and racecheck does not follow that lane.
template <class T>
CUTLASS_DEVICE void init_barriers(typename T::Shared& shared) {
  const auto init = [](auto& full, auto& empty, int n, int consumers) {
    for (int i = 0; i < n; ++i) {
      full[i].init(1);
      empty[i].init(consumers);
    }
  };
  init(shared.q_full, shared.q_empty, T::kQStages, T::kMixes ? T::kStoringThreads : T::kMathThreads);
  for (Barrier& full : shared.out_full) full.init(T::kMathThreads);
  shared.out_empty.init(32);  // the warp that stores
  init(shared.kv_full, shared.kv_empty, T::kBuffers, T::kMathThreads);
  init(shared.work_full, shared.work_empty, T::kWorkSlots,
       T::kMathThreads + 1 + T::kStoringThreads);  // and the TMA thread, and the warps that store
  shared.work_wanted.init(1);
  cutlass::arch::fence_barrier_init();
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) attend_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) char raw[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(raw);
  const int warpgroup = cutlass::canonical_warp_group_idx(), warp = cutlass::canonical_warp_idx_sync();
  if (threadIdx.x == 0) init_barriers<T>(shared);
  __syncthreads();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegs>();
    if (warp == 0) schedule<T>(p, shared);
    if constexpr (T::kStagesOutput)
      if (warp == 2) store_staged<T>(p, shared);
    // Last: where nothing follows, the compiler keeps what one thread does in uniform registers.
    if (warp == 1 && cute::elect_one_sync()) Loader<T>(p, shared).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kMathRegs>();
    Consumer<T>(p, shared, warpgroup - 1).run();
  }
}

}  // namespace flux::cuda::sm90
