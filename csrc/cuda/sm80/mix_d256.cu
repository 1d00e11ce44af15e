#include "cuda/sm80/mix.h"

namespace flux::cuda::sm80 {

template struct MixKernels<DType::kFloat16, 256>;
template struct MixKernels<DType::kBFloat16, 256>;

}  // namespace flux::cuda::sm80
