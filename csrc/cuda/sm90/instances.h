// The compiled instances of the kernel, and what a problem must be like to use them.
#pragma once

#include "cuda/sm90/params.h"

namespace flux::cuda::sm90 {

// Defined in launch.h, instantiated in attend_*.cu.
template <DType kDType, int kHeadDim, int kKvBlock>
cudaError_t launch_instance(const KernelParams& p, const AttendConfig& c, cudaStream_t stream);

// Three consumer warpgroups where their registers suffice: 192 rows, else 128.
constexpr int32_t warpgroups(int32_t head_dim) { return head_dim <= 64 ? 3 : 2; }

struct Instance {
  DType dtype;
  int32_t head_dim;  // and every smaller one
  int32_t kv_block;
  cudaError_t (*launch)(const KernelParams&, const AttendConfig&, cudaStream_t);

  constexpr int32_t tile_rows() const { return 64 * warpgroups(head_dim); }
};

}  // namespace flux::cuda::sm90
