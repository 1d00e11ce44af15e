// Element types of the CPU kernels: fp32 arithmetic on fp32, fp16 or bf16 storage.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/params.h"

namespace flux::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FLUX_HD float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FLUX_HD uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

FLUX_HD float to_float(float x) { return x; }
FLUX_HD float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FLUX_HD float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest, ties to even.
FLUX_HD void from_float(float f, float& out) { out = f; }
FLUX_HD void from_float(float f, BFloat16& out) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = uint16_t((bits >> 16) | 0x40);  // NaN stays NaN
    return;
  }
  out.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
FLUX_HD void from_float(float f, Half& out) {
  const uint32_t bits = float_to_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x47800000u) {  // beyond 65536, infinity or NaN
    out.bits = uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  } else {
    out.bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
  }
}

// Calls f with a null pointer of the element type.
template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace flux::cpu
