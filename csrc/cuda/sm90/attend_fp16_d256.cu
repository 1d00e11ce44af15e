#include "cuda/sm90/launch.h"

namespace flux::cuda::sm90 {

template cudaError_t launch<DType::kFloat16, 256, 1, 64>(const KernelParams&, int32_t, cudaStream_t);
template cudaError_t launch<DType::kFloat16, 256, 2, 64>(const KernelParams&, int32_t, cudaStream_t);

}  // namespace flux::cuda::sm90
