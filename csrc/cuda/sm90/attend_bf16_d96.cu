#include "cuda/sm90/launch.h"

namespace flux::cuda::sm90 {

template cudaError_t launch<DType::kBFloat16, 96, 1, 128>(const KernelParams&, int32_t, cudaStream_t);
template cudaError_t launch<DType::kBFloat16, 96, 2, 128>(const KernelParams&, int32_t, cudaStream_t);
template cudaError_t launch<DType::kBFloat16, 96, 2, 64>(const KernelParams&, int32_t, cudaStream_t);

}  // namespace flux::cuda::sm90
