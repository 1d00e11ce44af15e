#include "cuda/sm80/backward.h"

namespace flux::cuda::sm80 {

template struct BackwardKernels<DType::kFloat16, 64>;
template struct BackwardKernels<DType::kBFloat16, 64>;

}  // namespace flux::cuda::sm80
