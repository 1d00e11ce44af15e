// Host side of one instance.
#pragma once

#include "cuda/dependent_launch.h"
#include "cuda/sm90/instances.h"
#include "cuda/sm90/kernel.h"

namespace flux::cuda::sm90 {

template <DType kDType, int kHeadDim, int kKvBlock, int kWarpgroups>
cudaError_t launch_instance(const KernelParams& p, const AttendConfig& c, cudaStream_t stream) {
  using Element = std::conditional_t<kDType == DType::kFloat16, cutlass::half_t, cutlass::bfloat16_t>;
  using T = Traits<Element, kHeadDim, kWarpgroups, kKvBlock>;
  const auto kernel = attend_kernel<T>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes))
    return e;
  return cuda::launch(kernel, dim3(c.num_workers), T::kThreads, T::kSharedBytes, stream, c.overlap, p);
}

}  // namespace flux::cuda::sm90
