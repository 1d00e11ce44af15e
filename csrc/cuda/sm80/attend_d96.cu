#include "cuda/sm80/kernel.h"

namespace flux::cuda::sm80 {

template struct Kernel<DType::kFloat16, 96, kDecodeRows>;
template struct Kernel<DType::kFloat16, 96, kSmallRows>;
template struct Kernel<DType::kFloat16, 96, most_tile_rows(96)>;
template struct Kernel<DType::kBFloat16, 96, kDecodeRows>;
template struct Kernel<DType::kBFloat16, 96, kSmallRows>;
template struct Kernel<DType::kBFloat16, 96, most_tile_rows(96)>;

}  // namespace flux::cuda::sm80
