// fp16 and bf16 on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/params.h"

namespace flux::cuda {

template <DType kDType>
using Element = std::conditional_t<kDType == DType::kFloat16, __half, __nv_bfloat16>;

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

// Two elements of one register.
template <typename T>
__device__ inline float2 unpack(uint32_t x);
template <>
__device__ inline float2 unpack<__half>(uint32_t x) {
  const __half2& pair = reinterpret_cast<const __half2&>(x);
  return {float(pair.x), float(pair.y)};
}
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t x) {  // one instruction each
  const uint32_t lo = x << 16, hi = x & 0xffff0000u;
  return {reinterpret_cast<const float&>(lo), reinterpret_cast<const float&>(hi)};
}

// (1 - weight) * full + weight * sparse, eight elements of each.
template <typename T>
__device__ inline uint4 mix_chunk(const uint4& full, const uint4& sparse, float weight) {
  const auto mix = [&](uint32_t x, uint32_t y) {
    const float2 f = unpack<T>(x), s = unpack<T>(y);
    return pack<T>((1.f - weight) * f.x + weight * s.x, (1.f - weight) * f.y + weight * s.y);
  };
  return {mix(full.x, sparse.x), mix(full.y, sparse.y), mix(full.z, sparse.z), mix(full.w, sparse.w)};
}

}  // namespace flux::cuda
