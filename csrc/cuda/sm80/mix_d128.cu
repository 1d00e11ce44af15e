#include "cuda/sm80/mix.h"

namespace flux::cuda::sm80 {

template struct MixKernels<DType::kFloat16, 128>;
template struct MixKernels<DType::kBFloat16, 128>;

}  // namespace flux::cuda::sm80
