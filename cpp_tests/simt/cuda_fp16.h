#pragma once

#include "cpu/element.h"
#include "cuda_runtime.h"

struct __half {
  flux::cpu::Half value;
  __half() = default;
  __half(float x) { flux::cpu::from_float(x, value); }
  operator float() const { return flux::cpu::to_float(value); }
};
struct alignas(4) __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
