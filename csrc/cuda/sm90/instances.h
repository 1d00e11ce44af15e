// The compiled instances of the kernel, and what a problem must be like to use them.
#pragma once

#include "cuda/sm90/params.h"

namespace flux::cuda::sm90 {

// Defined in launch_instance.h, instantiated in attend_*.cu.
template <DType kDType, int kHeadDim, int kKvBlock, int kWarpgroups>
cudaError_t launch_instance(const KernelParams& p, const AttendConfig& c, cudaStream_t stream);

struct Instance {
  DType dtype;
  int32_t head_dim;  // and every smaller one
  int32_t kv_block;
  int32_t tile_rows;  // 64 per consumer warpgroup
  cudaError_t (*launch)(const KernelParams&, const AttendConfig&, cudaStream_t);
};

}  // namespace flux::cuda::sm90
