// fp16 and bf16 on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flux::cuda {

// Two floats, rounded, in one register.
template <typename T>
__device__ inline uint32_t pack(float lo, float hi);
template <>
__device__ inline uint32_t pack<__half>(float lo, float hi) {
  const __half2 x = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(x);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(x);
}

}  // namespace flux::cuda
