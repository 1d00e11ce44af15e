#include "cuda/sm80/mix.h"

namespace flux::cuda::sm80 {

template struct MixKernels<DType::kFloat16, 64>;
template struct MixKernels<DType::kBFloat16, 64>;

}  // namespace flux::cuda::sm80
