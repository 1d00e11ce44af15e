#include "cuda/sm80/kernel.h"

namespace flux::cuda::sm80 {

template struct Kernel<DType::kFloat16, 128, kDecodeRows>;
template struct Kernel<DType::kFloat16, 128, kSmallRows>;
template struct Kernel<DType::kFloat16, 128, most_tile_rows(128)>;
template struct Kernel<DType::kBFloat16, 128, kDecodeRows>;
template struct Kernel<DType::kBFloat16, 128, kSmallRows>;
template struct Kernel<DType::kBFloat16, 128, most_tile_rows(128)>;

}  // namespace flux::cuda::sm80
