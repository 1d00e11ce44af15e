// The gradients of mixtures on Hopper: the kernels of hard routes, with other walks.
#pragma once

#include "cuda/mix_backward.h"
#include "cuda/sm90/launch_backward.h"
#include "cuda/sm90/mix_kernels.h"

namespace flux::cuda::sm90 {

template <DType kDType, int kDim>
cudaError_t MixBackwardKernels<kDType, kDim>::launch_queries(const MixBackwardParams& b, const MixBackwardWorkspace& w,
                                                             cudaStream_t stream) {
  return launch_queries_backward<QueriesBackward<CutlassElement<kDType>, kDim, MixedWalks>>(b, w, stream);
}

template <DType kDType, int kDim>
cudaError_t MixBackwardKernels<kDType, kDim>::launch_keys(const MixBackwardParams& b, const MixBackwardWorkspace& w,
                                                          cudaStream_t stream) {
  return launch_keys_backward<KeysBackward<CutlassElement<kDType>, kDim, MixedWalks>>(b, w, stream);
}

}  // namespace flux::cuda::sm90
