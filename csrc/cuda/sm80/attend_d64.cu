#include "cuda/sm80/kernel.h"

namespace flux::cuda::sm80 {

template struct Kernel<DType::kFloat16, 64, kDecodeRows>;
template struct Kernel<DType::kFloat16, 64, kSmallRows>;
template struct Kernel<DType::kFloat16, 64, most_tile_rows(64)>;
template struct Kernel<DType::kBFloat16, 64, kDecodeRows>;
template struct Kernel<DType::kBFloat16, 64, kSmallRows>;
template struct Kernel<DType::kBFloat16, 64, most_tile_rows(64)>;

}  // namespace flux::cuda::sm80
