#pragma once

#include "cpu/element.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  flux::cpu::BFloat16 value;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) { flux::cpu::from_float(x, value); }
  operator float() const { return flux::cpu::to_float(value); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
