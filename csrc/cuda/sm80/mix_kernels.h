// The kernels of mixtures of this family, as the host names them; defined in mix.h, instantiated in mix_d*.cu. For head
// dimensions up to kDim, by zero fill.
#pragma once

#include "cuda/mix.h"

namespace flux::cuda::sm80 {

template <DType kDType, int kDim>
struct MixKernels {
  static cudaError_t launch(const AttendParams& p, const Mixture& m, cudaStream_t stream);
  // The gradients; the first leaves in the workspace what the second reads.
  static cudaError_t launch_queries(const MixBackwardParams& b, const MixBackwardWorkspace& w, cudaStream_t stream);
  static cudaError_t launch_keys(const MixBackwardParams& b, const MixBackwardWorkspace& w, cudaStream_t stream);
};

}  // namespace flux::cuda::sm80
