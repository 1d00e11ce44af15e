#include "cuda/sm80/backward.h"

namespace flux::cuda::sm80 {

template struct BackwardKernels<DType::kFloat16, 128>;
template struct BackwardKernels<DType::kBFloat16, 128>;

}  // namespace flux::cuda::sm80
