#include "cuda/sm80/kernel.h"

namespace flux::cuda::sm80 {

template struct Kernel<DType::kFloat16, 256, kDecodeRows>;
template struct Kernel<DType::kFloat16, 256, kSmallRows>;
template struct Kernel<DType::kBFloat16, 256, kDecodeRows>;
template struct Kernel<DType::kBFloat16, 256, kSmallRows>;

}  // namespace flux::cuda::sm80
