#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // products that are 80 keys wide
#include "cuda/sm90/launch_instance.h"

namespace flux::cuda::sm90 {

template cudaError_t launch_instance<DType::kFloat16, 256, 80, 2>(const KernelParams&, const AttendConfig&,
                                                                  cudaStream_t);
template cudaError_t launch_instance<DType::kFloat16, 256, 64, 2>(const KernelParams&, const AttendConfig&,
                                                                  cudaStream_t);
template cudaError_t launch_instance<DType::kFloat16, 256, 64, 1>(const KernelParams&, const AttendConfig&,
                                                                  cudaStream_t);

}  // namespace flux::cuda::sm90
