// Host side of the gradient kernels of this family.
#pragma once

#include "cuda/sm90/backward_kernels.h"
#include "cuda/sm90/backward_keys.h"
#include "cuda/sm90/backward_queries.h"

namespace flux::cuda::sm90 {

template <DType kDType>
using CutlassElement = std::conditional_t<kDType == DType::kFloat16, cutlass::half_t, cutlass::bfloat16_t>;

template <DType kDType, int kDim>
cudaError_t BackwardKernels<kDType, kDim>::launch_queries(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                                          cudaStream_t stream) {
  return launch_queries_backward<QueriesBackward<CutlassElement<kDType>, kDim, HardWalks>>(b, w, stream);
}

template <DType kDType, int kDim>
cudaError_t BackwardKernels<kDType, kDim>::launch_keys(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                                       cudaStream_t stream) {
  using Element = CutlassElement<kDType>;
  using Body = std::conditional_t<(kDim > 128), WideKeysBackward<Element, kDim, HardWalks>,
                                  KeysBackward<Element, kDim, HardWalks>>;
  return launch_keys_backward<Body>(b, w, stream);
}

}  // namespace flux::cuda::sm90
