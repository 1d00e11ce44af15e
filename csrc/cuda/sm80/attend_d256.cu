#include "cuda/sm80/kernel.h"

template struct flux::cuda::sm80::Kernels<256>;
