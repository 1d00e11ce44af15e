// The compiled instances of the kernel, and what a problem must be like to use them.
#pragma once

#include "cuda/sm90/params.h"

namespace flux::cuda::sm90 {

// Defined in launch.h, instantiated in attend_*.cu.
template <DType kDType, int kHeadDim, int kKvBlock>
cudaError_t launch_instance(const KernelParams& p, const AttendConfig& c, cudaStream_t stream);

// Consumer warpgroups of every instance. (Three, 192 rows, made head dimension 64 8 % faster, but spilled registers.)
constexpr int32_t kWarpgroups = 2;

struct Instance {
  DType dtype;
  int32_t head_dim;  // and every smaller one
  int32_t kv_block;
  cudaError_t (*launch)(const KernelParams&, const AttendConfig&, cudaStream_t);

  static constexpr int32_t tile_rows() { return 64 * kWarpgroups; }
};

}  // namespace flux::cuda::sm90
