// The kernels of this family, as the host names them.
#pragma once

#include "cuda/sm90/params.h"

namespace flux::cuda::sm90 {

// Defined in launch_instance.h, instantiated in attend_*.cu.
template <DType kDType, int kHeadDim, int kKvBlock, int kWarpgroups>
cudaError_t launch_instance(const KernelParams& p, const AttendConfig& c, cudaStream_t stream);

}  // namespace flux::cuda::sm90
