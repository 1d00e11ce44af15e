#include "cuda/sm90/mix_backward.h"

namespace flux::cuda::sm90 {

template struct MixBackwardKernels<DType::kFloat16, 128>;
template struct MixBackwardKernels<DType::kBFloat16, 128>;

}  // namespace flux::cuda::sm90
