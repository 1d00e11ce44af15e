#include "cuda/sm90/mix_backward.h"
#include "cuda/sm90/mix_ordered.h"

namespace flux::cuda::sm90 {

template struct MixBackwardKernels<DType::kFloat16, 128>;
template struct MixBackwardKernels<DType::kBFloat16, 128>;

template cudaError_t launch_ordered_mix_backward<DType::kFloat16>(const MixBackwardParams&, const MixBackwardWorkspace&,
                                                                  const Device&, cudaStream_t);
template cudaError_t launch_ordered_mix_backward<DType::kBFloat16>(const MixBackwardParams&,
                                                                   const MixBackwardWorkspace&, const Device&,
                                                                   cudaStream_t);

}  // namespace flux::cuda::sm90
