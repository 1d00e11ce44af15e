#include "cuda/sm90/launch_backward.h"

namespace flux::cuda::sm90 {

template struct BackwardKernels<DType::kFloat16, 64>;
template struct BackwardKernels<DType::kBFloat16, 64>;

}  // namespace flux::cuda::sm90
