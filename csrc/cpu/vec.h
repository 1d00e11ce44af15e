// Vectors of the instruction set this file is compiled for (FLUX_ISA names it and its namespace).
//
// GCC's and Clang's vector types do nearly all: arithmetic, comparison, `mask ? a : b`. Every function is
// always inlined, so that no copy of it leaves the file (see core/macros.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu/element.h"

namespace flux::cpu::FLUX_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitsVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

FLUX_HD Vec broadcast(float x) { return x - Vec{}; }
FLUX_HD IntVec broadcast(int32_t x) { return x - IntVec{}; }

template <typename V, typename T>
FLUX_HD V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
FLUX_HD void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// kLanes elements as fp32.
FLUX_HD Vec load(const float* p) { return load_as<Vec>(p); }
FLUX_HD Vec load(const BFloat16* p) { return Vec(__builtin_convertvector(load_as<HalfVec>(p), BitsVec) << 16); }
FLUX_HD Vec load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_as<__m128i>(p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The larger of the two; b where a is NaN.
FLUX_HD Vec max_of(Vec a, Vec b) { return a > b ? a : b; }

FLUX_HD float sum_of_lanes(Vec v) {
  float sum = 0.f;
#if defined(__AVX512F__)
  sum = _mm512_reduce_add_ps(v);
#else
  float x[kLanes];
  store(x, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  sum = x[0];
#endif
  return sum;
}

FLUX_HD float max_of_lanes(Vec v) {
  float x[kLanes];
  store(x, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  return x[0];
}

// 2^x for x <= 127 within 1 ulp; results below 2^-126 are 0, NaN stays NaN.
// Splits x = n + f with |f| <= 1/2; 2^f is the degree-6 polynomial of least relative error with value 1 at 0.
FLUX_HD Vec exp2_of(Vec x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const Vec shifted = x + kRound;
  const Vec f = x - (shifted - kRound);
  Vec p = broadcast(1.5594681287e-4f);
  p = p * f + 1.3406643715e-3f;
  p = p * f + 9.6176929598e-3f;
  p = p * f + 5.5503105516e-2f;
  p = p * f + 2.4022652783e-1f;
  p = p * f + 6.9314721497e-1f;
  p = p * f + 1.f;
  const Vec scaled = Vec(BitsVec(p) + (BitsVec(shifted) << 23));
  const Vec y = x < -126.f ? Vec{} : scaled;
  return x == x ? y : x;
}

}  // namespace flux::cpu::FLUX_ISA
