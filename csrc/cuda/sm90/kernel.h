// The persistent kernel: a producer warpgroup (scheduler warp, TMA warp) and the consumer warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/sm90/load.h"
#include "cuda/sm90/mainloop.h"

namespace flux::cuda::sm90 {

template <class T>
CUTLASS_DEVICE void init_barriers(typename T::Shared& shared) {
  constexpr int kWarps = T::kMathThreads / 32;
  shared.q_full.init(1);
  shared.q_empty.init(kWarps);
  for (int i = 0; i < T::kStages; ++i) {
    shared.k_full[i].init(1);
    shared.v_full[i].init(1);
    shared.k_empty[i].init(kWarps);
    shared.v_empty[i].init(kWarps);
  }
  for (int i = 0; i < T::kWorkSlots; ++i) {
    shared.work_full[i].init(1);
    shared.work_empty[i].init(kWarps + 1);  // and the TMA thread
  }
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
    if (warp == 0 && cute::elect_one_sync()) Loader<T>(p, shared).run();
    if (warp == 1 && cute::elect_one_sync()) schedule<T>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kMathRegs>();
    Consumer<T>(p, shared, warpgroup - 1).run();
  }
}

}  // namespace flux::cuda::sm90
