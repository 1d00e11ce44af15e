#include "cuda/sm80/backward.h"

namespace flux::cuda::sm80 {

template struct BackwardKernels<DType::kFloat16, 96>;
template struct BackwardKernels<DType::kBFloat16, 96>;

}  // namespace flux::cuda::sm80
