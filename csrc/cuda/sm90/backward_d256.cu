#include "cuda/sm90/launch_backward.h"

namespace flux::cuda::sm90 {

template struct BackwardKernels<DType::kFloat16, 256>;
template struct BackwardKernels<DType::kBFloat16, 256>;

}  // namespace flux::cuda::sm90
