// The one matrix product of the CPU kernels, C = A B on blocks that fit in the cache, and the packing of its operands.
//
// Operands are arrays of 32-bit units: an fp32 number, or (where the processor multiplies them) two bf16 numbers that
// are neighbours along the inner dimension. One element of A is broadcast against kPanel columns of B.
#pragma once

#include "cpu/vec.h"

namespace flux::cpu::FLUX_ISA {

constexpr int kPanel = 2 * kLanes;                   // columns of C per step
constexpr int kStepRows = kRegisters == 32 ? 8 : 4;  // rows of C per step: its elements stay in registers

struct Float32Units {
  static constexpr int kPerUnit = 1;
  using Unit = float;
  using BVec = Vec;
  static FLUX_HD Vec multiply_add(Unit a, BVec b, Vec c) { return c + a * b; }
};

#ifdef __AVX512BF16__
struct BFloat16Pairs {
  static constexpr int kPerUnit = 2;
  using Unit = uint32_t;
  using BVec = BitsVec;
  static FLUX_HD Vec multiply_add(Unit a, BVec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int32_t(a)), (__m512bh)b);
  }
};
#endif

struct Accumulators {
  Vec c[kStepRows][2];
};

// c += A[kStepRows, units] B[units, kPanel]; element (i, k) of A is a[i * row_stride + k * unit_stride].
template <typename Op>
FLUX_HD void multiply(const typename Op::Unit* a, int64_t row_stride, int64_t unit_stride, const typename Op::Unit* b,
                      int64_t b_stride, int32_t units, Accumulators& acc) {
  Vec c[kStepRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kStepRows; ++i) c[i][0] = acc.c[i][0], c[i][1] = acc.c[i][1];
  for (int32_t k = 0; k < units; ++k) {
    const auto b0 = load_as<typename Op::BVec>(b + k * b_stride);
    const auto b1 = load_as<typename Op::BVec>(b + k * b_stride + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kStepRows; ++i) {
      const auto x = a[i * row_stride + k * unit_stride];
      c[i][0] = Op::multiply_add(x, b0, c[i][0]);
      c[i][1] = Op::multiply_add(x, b1, c[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kStepRows; ++i) acc.c[i][0] = c[i][0], acc.c[i][1] = c[i][1];
}

FLUX_HD void clear(Accumulators& acc) {
  for (auto& row : acc.c) row[0] = row[1] = Vec{};
}

// ---- packing ----

// One row of `dim` elements (a multiple of 8), as fp32; of bf16 also as it is, in pairs.
template <typename T>
FLUX_HD void pack_row(const T* x, int32_t dim, float* to) {
  int32_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(x + d));
  for (; d < dim; ++d) to[d] = to_float(x[d]);
}
FLUX_HD void pack_row(const BFloat16* x, int32_t dim, uint32_t* to) { std::memcpy(to, x, size_t(dim) * 2); }

// Rows [n, end) of zeros.
template <typename Unit>
FLUX_HD void clear_rows(Unit* to, int64_t stride, int32_t units, int32_t n, int32_t end) {
  for (int32_t r = n; r < end; ++r) std::memset(to + r * stride, 0, size_t(units) * sizeof(Unit));
}

// rows[kPanel][stride] -> to[units][kPanel]
template <typename Unit>
FLUX_HD void transpose_panel(const Unit* rows, int64_t stride, int32_t units, Unit* to) {
  constexpr int kBlock = 8;  // one cache line of `to` at a time would thrash; units come in eights or fours
  for (int32_t u = 0; u < units; u += kBlock) {
    const int32_t end = units < u + kBlock ? units : u + kBlock;
    for (int r = 0; r < kPanel; ++r)
      for (int32_t i = u; i < end; ++i) to[i * kPanel + r] = rows[r * stride + i];
  }
}

}  // namespace flux::cpu::FLUX_ISA
