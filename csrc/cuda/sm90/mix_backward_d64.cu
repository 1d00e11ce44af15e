#include "cuda/sm90/mix_backward.h"

namespace flux::cuda::sm90 {

template struct MixBackwardKernels<DType::kFloat16, 64>;
template struct MixBackwardKernels<DType::kBFloat16, 64>;

}  // namespace flux::cuda::sm90
