#include "cuda/sm80/launch.h"

template struct flux::cuda::sm80::Kernels<64>;
