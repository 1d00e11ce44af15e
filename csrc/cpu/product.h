// The two products of attention on a panel of rows, S^T = K Q^T and O = P V, and how each instruction set takes their
// operands.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#ifdef __AMX_BF16__
#include "cpu/amx.h"
#endif

namespace flux::cpu::FLUX_ISA {

FLUX_HD void store_step(const Accumulators& a, float factor, float* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kStepRows; ++i) {
    store(to + i * kPanel, a.c[i][0] * factor);
    store(to + i * kPanel + kLanes, a.c[i][1] * factor);
  }
}

// The two products on a panel by vector instructions, whatever their units are.
template <typename Units>
struct VectorProduct : Units {
  using Unit = typename Units::Unit;
  struct Registers {};                        // what a thread has to hold meanwhile
  static constexpr int kKeyStep = kStepRows;  // keys, and units along head_dim, are padded to a multiple
  static constexpr int kUnitStep = 1;

  // scores[keys, kPanel] = scale K Q^T. k [keys][stride], q [units][kPanel]
  static FLUX_HD void score(const Unit* k, int64_t stride, const Unit* q, int32_t units, int32_t keys, float scale,
                            float* scores) {
    for (int32_t j = 0; j < keys; j += kStepRows) {
      Accumulators s;
      clear(s);
      multiply<Units>(k + j * stride, stride, 1, q, kPanel, units, s);
      store_step(s, scale, scores + j * kPanel);
    }
  }

  // out[rows, dim] = rescale out + P V. p [units][kPanel], values [units][stride]
  static FLUX_HD void add_values(const Unit* p, const Unit* values, int64_t stride, int32_t units, int32_t rows,
                                 int32_t dim, const float* rescale, float* out, int64_t out_stride) {
    for (int32_t d = 0; d < dim; d += kPanel)
      for (int32_t r = 0; r < rows; r += kStepRows) {
        float* to = out + r * out_stride + d;
        Accumulators o;
#pragma GCC unroll 8
        for (int i = 0; i < kStepRows; ++i) {
          o.c[i][0] = load(to + i * out_stride) * rescale[r + i];
          o.c[i][1] = load(to + i * out_stride + kLanes) * rescale[r + i];
        }
        multiply<Units>(p + r, 1, kPanel, values + d, stride, units, o);
#pragma GCC unroll 8
        for (int i = 0; i < kStepRows; ++i) {
          store(to + i * out_stride, o.c[i][0]);
          store(to + i * out_stride + kLanes, o.c[i][1]);
        }
      }
  }
};

struct Float32Product : VectorProduct<Float32Units> {
  template <typename T>
  static FLUX_HD void pack_keys(const T* x, int32_t dim, float* to) {
    pack_row(x, dim, to);
  }
  // Values of keys [0, n): [n][stride]
  template <typename Row>
  static FLUX_HD void pack_values(Row row, int32_t n, int32_t dim, int64_t stride, float* to) {
    for (int32_t j = 0; j < n; ++j) pack_row(row(j), dim, to + j * stride);
  }
  static FLUX_HD const float* pack_probabilities(const float* p, int32_t, float*) { return p; }
};

#ifdef __AVX512BF16__
// Two neighbouring keys of a panel, as bf16.
FLUX_HD BitsVec key_pair(const float* p) {
  const auto lo = (HalfVec)_mm512_cvtneps_pbh(load(p)), hi = (HalfVec)_mm512_cvtneps_pbh(load(p + kPanel));
  return __builtin_convertvector(lo, BitsVec) | __builtin_convertvector(hi, BitsVec) << 16;
}

struct BFloat16Product : VectorProduct<BFloat16Pairs> {
  static FLUX_HD void pack_keys(const BFloat16* x, int32_t dim, uint32_t* to) { pack_row(x, dim, to); }
  // Two keys to a unit: [ceil(n / 2)][stride]
  template <typename Row>
  static FLUX_HD void pack_values(Row row, int32_t n, int32_t dim, int64_t stride, uint32_t* to) {
    static const BFloat16 zeros[256] = {};
    for (int32_t j = 0; j < n; j += 2) {
      const BFloat16* lo = row(j);
      const BFloat16* hi = j + 1 < n ? row(j + 1) : zeros;
      uint32_t* unit = to + j / 2 * stride;
      int32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes)
        store(unit + d, __builtin_convertvector(load_as<HalfVec>(lo + d), BitsVec) |
                            __builtin_convertvector(load_as<HalfVec>(hi + d), BitsVec) << 16);
      for (; d < dim; ++d) unit[d] = lo[d].bits | uint32_t(hi[d].bits) << 16;
    }
  }
  // p: [n (even), kPanel] -> [n / 2, kPanel]
  static FLUX_HD const uint32_t* pack_probabilities(const float* p, int32_t n, uint32_t* to) {
    for (int32_t j = 0; j < n; j += 2)
      for (int half = 0; half < kPanel; half += kLanes)
        store(to + j / 2 * kPanel + half, key_pair(p + j * kPanel + half));
    return to;
  }
};
#endif

#ifdef __AMX_BF16__
// The same operands for the matrix unit, but for the probabilities: it takes the left operand row by row.
struct TileProduct : BFloat16Product {
  using Registers = TileRegisters;
  static constexpr int kKeyStep = 2 * kTile, kUnitStep = kTile;
  static_assert(kPanel == 2 * kTile && kKvBlock % kKeyStep == 0);

  static FLUX_HD void score(const uint32_t* k, int64_t stride, const uint32_t* q, int32_t units, int32_t keys,
                            float scale, float* scores) {
    for (int32_t j = 0; j < keys; j += kKeyStep)
      multiply_tiles<false>(k + j * stride, stride, q, kPanel, units, scores + j * kPanel, kPanel);
    for (int32_t i = 0; i < keys * kPanel; i += kLanes) store(scores + i, load(scores + i) * scale);
  }

  // p: [n, kPanel] -> [kPanel, n / 2]
  static FLUX_HD const uint32_t* pack_probabilities(const float* p, int32_t n, uint32_t* to) {
    for (int32_t unit = 0; unit < n / 2; unit += kTile)
      for (int half = 0; half < kPanel; half += kLanes) {
        BitsVec tile[kTile];
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) tile[i] = key_pair(p + 2 * (unit + i) * kPanel + half);
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < kTile; ++i) store(to + (half + i) * (n / 2) + unit, tile[i]);
      }
    return to;
  }

  // p [kPanel][units]. All rows of the panel are computed.
  static FLUX_HD void add_values(const uint32_t* p, const uint32_t* values, int64_t stride, int32_t units, int32_t,
                                 int32_t dim, const float* rescale, float* out, int64_t out_stride) {
    for (int r = 0; r < kPanel; ++r)
      if (rescale[r] != 1.f)  // seldom, once the largest scores have been seen
        for (int32_t d = 0; d < dim; d += kLanes) {
          float* to = out + r * out_stride + d;
          store(to, load(to) * rescale[r]);
        }
    for (int32_t d = 0; d < dim; d += kPanel)
      multiply_tiles<true>(p, units, values + d, stride, units, out + d, out_stride);
  }
};
#endif

// Units of a row of q or k that a product takes.
template <typename Op>
FLUX_HD int32_t row_units(const AttendParams& p) {
  return round_up(p.head_dim / Op::kPerUnit, Op::kUnitStep);
}

}  // namespace flux::cpu::FLUX_ISA
