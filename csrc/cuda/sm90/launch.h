// Host side of one instance.
#pragma once

#include "cuda/sm90/instances.h"
#include "cuda/sm90/kernel.h"

namespace flux::cuda::sm90 {

template <DType kDType, int kHeadDim, int kWarpgroups, int kKvBlock>
cudaError_t launch(const KernelParams& p, int32_t num_blocks, cudaStream_t stream) {
  using Element = std::conditional_t<kDType == DType::kFloat16, cutlass::half_t, cutlass::bfloat16_t>;
  using T = Traits<Element, kHeadDim, kWarpgroups, kKvBlock>;
  const auto kernel = attend_kernel<T>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_blocks, T::kThreads, T::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flux::cuda::sm90
