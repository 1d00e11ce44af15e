// The kernels of mixtures of this family, as the host names them.
#pragma once

#include "cuda/mix.h"
#include "cuda/sm90/params.h"

namespace flux::cuda::sm90 {

constexpr int kMixRows = 128, kMixKeys = 128;  // of a tile and of a block

struct MixKernelParams : KernelParams {
  Mixture mixture;
  MixTiles tiles;
  int32_t* next_item;  // the counter that thread blocks take tiles from; starts at 0
};

// Defined in mix.h, instantiated in mix_*.cu.
template <DType kDType, int kHeadDim>
cudaError_t launch_mix(const MixKernelParams& p, const Device& device, cudaStream_t stream);

// Of the gradients, as sm80::MixKernels; defined in mix_backward.h, instantiated in mix_backward_d*.cu.
template <DType kDType, int kDim>
struct MixBackwardKernels {
  static cudaError_t launch_queries(const MixBackwardParams& b, const MixBackwardWorkspace& w, cudaStream_t stream);
  static cudaError_t launch_keys(const MixBackwardParams& b, const MixBackwardWorkspace& w, cudaStream_t stream);
};

// Defined in mix_ordered.h: at head dimensions from 97 to 128, of patterns without lists (can_add_in_order).
template <DType kDType>
cudaError_t launch_ordered_mix_backward(const MixBackwardParams& b, const MixBackwardWorkspace& w, const Device& device,
                                        cudaStream_t stream);

}  // namespace flux::cuda::sm90
