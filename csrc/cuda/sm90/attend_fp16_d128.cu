#include "cuda/sm90/launch_instance.h"

namespace flux::cuda::sm90 {

template cudaError_t launch_instance<DType::kFloat16, 128, 128, 2>(const KernelParams&, const AttendConfig&,
                                                                   cudaStream_t);
template cudaError_t launch_instance<DType::kFloat16, 128, 64, 2>(const KernelParams&, const AttendConfig&,
                                                                  cudaStream_t);
template cudaError_t launch_instance<DType::kFloat16, 128, 64, 1>(const KernelParams&, const AttendConfig&,
                                                                  cudaStream_t);

}  // namespace flux::cuda::sm90
