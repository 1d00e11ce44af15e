// The compiled instances of the kernel, and what a problem must be like to use them.
#pragma once

#include "cuda/sm90/params.h"

namespace flux::cuda::sm90 {

// Tiles of 64 * warpgroups rows against kv_block keys. Defined in launch.h, instantiated in attend_*.cu.
template <DType kDType, int kHeadDim, int kWarpgroups, int kKvBlock>
cudaError_t launch(const KernelParams& p, int32_t num_blocks, cudaStream_t stream);

using Launch = cudaError_t (*)(const KernelParams&, int32_t, cudaStream_t);

struct Instance {
  DType dtype;
  int32_t head_dim;  // and every smaller one
  int32_t tile_rows, kv_block;
  Launch launch;
};

constexpr int32_t kDecodeRows = 64, kPrefillRows = 128;

}  // namespace flux::cuda::sm90
