#include "cuda/sm90/mix.h"

namespace flux::cuda::sm90 {

template cudaError_t launch_mix<DType::kFloat16, 64>(const MixKernelParams&, const Device&, cudaStream_t);
template cudaError_t launch_mix<DType::kFloat16, 96>(const MixKernelParams&, const Device&, cudaStream_t);
template cudaError_t launch_mix<DType::kFloat16, 128>(const MixKernelParams&, const Device&, cudaStream_t);

}  // namespace flux::cuda::sm90
