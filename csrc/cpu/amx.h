// The matrix unit of Intel's processors (AMX with bf16): products of two tiles of 16 rows of 64 bytes each.
//
// GCC and Clang name a tile register in the instruction's text, so the eight of them are numbered here and no compiler
// allocates them.
#pragma once

#include "cpu/vec.h"

namespace flux::cpu::FLUX_ISA {

constexpr int kTile = 16;  // rows of a tile, and its 32-bit units per row

// Palette 1, then 64 bytes a row for each of the eight registers (16-bit numbers), and 16 rows.
alignas(64) constexpr uint8_t kTileShapes[64] = {1,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,  //
                                                 64, 0,  64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 64, 0,  //
                                                 0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,  //
                                                 16, 16, 16, 16, 16, 16, 16, 16, 0,  0, 0,  0, 0,  0, 0,  0};

// The thread's tile registers, in use. Given back, they are not saved when the system switches threads.
class TileRegisters {
 public:
  FLUX_HD TileRegisters() { _tile_loadconfig(kTileShapes); }
  FLUX_HD ~TileRegisters() { _tile_release(); }
};

// c[2 * kTile, 2 * kTile] = A B, or c + A B. A unit is a pair of bf16 that are neighbours along the inner dimension:
// a [2 * kTile, units], b [units, 2 * kTile]; `units` is a multiple of kTile. Strides in units.
template <bool kAdd>
FLUX_HD void multiply_tiles(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int32_t units,
                            float* c, int64_t c_stride) {
  const int64_t a_bytes = 4 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
  float* const lower = c + kTile * c_stride;
  asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kTile, c_bytes);
    _tile_loadd(2, lower, c_bytes);
    _tile_loadd(3, lower + kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int32_t k = 0; k < units; k += kTile) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * b_stride, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + k * b_stride + kTile, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile * a_stride + k, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTile, c_bytes);
  _tile_stored(2, lower, c_bytes);
  _tile_stored(3, lower + kTile, c_bytes);
}

// Transposes 16 vectors of 16 units: four times, halves of 8, 4, 2 and 1 units change places.
FLUX_HD void transpose(BitsVec (&x)[kTile]) {
#pragma GCC unroll 4
  for (int step = 8; step > 0; step /= 2) {
    BitsVec low, high;  // of two vectors one behind the other: what stays, and what comes from the other
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      low[j] = j & step ? kTile + (j ^ step) : j;
      high[j] = j & step ? kTile + j : j ^ step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
      if (i & step) continue;
      const auto a = (__m512i)x[i], b = (__m512i)x[i + step];
      x[i] = (BitsVec)_mm512_permutex2var_epi32(a, (__m512i)low, b);
      x[i + step] = (BitsVec)_mm512_permutex2var_epi32(a, (__m512i)high, b);
    }
  }
}

}  // namespace flux::cpu::FLUX_ISA
