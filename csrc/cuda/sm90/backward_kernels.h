// The gradient kernels of this family, as the host names them: for any head dimension, layout and group.
#pragma once

#include "cuda/cuda.h"

namespace flux::cuda::sm90 {

// Defined in launch_backward.h, instantiated in backward_d*.cu. As sm80::BackwardKernels.
template <DType kDType, int kDim>
struct BackwardKernels {
  static cudaError_t launch_queries(const AttendBackwardParams& b, const BackwardWorkspace& w, cudaStream_t stream);
  static cudaError_t launch_keys(const AttendBackwardParams& b, const BackwardWorkspace& w, cudaStream_t stream);
};

constexpr int32_t kOrderedGroup = 8;  // rows that the loading threads of the kernel below step by

// Of full attention, at head dimensions up to 128 (adds_in_order). Defined in backward_ordered.cu.
template <DType kDType>
cudaError_t launch_ordered_backward(const AttendBackwardParams& b, const BackwardWorkspace& w, const Device& device,
                                    cudaStream_t stream);

}  // namespace flux::cuda::sm90
