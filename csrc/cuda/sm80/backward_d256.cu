#include "cuda/sm80/backward.h"

namespace flux::cuda::sm80 {

template struct BackwardKernels<DType::kFloat16, 256>;
template struct BackwardKernels<DType::kBFloat16, 256>;

}  // namespace flux::cuda::sm80
