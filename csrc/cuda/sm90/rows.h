// The two rows of a tile that one thread of a consumer warpgroup holds.
//
// WGMMA accumulators of 64 rows and N columns lie in registers as value[4 * j + 2 * r + c]: row
// 16 * warp + lane / 4 + 8 * r of the warpgroup, column 8 * j + 2 * (lane % 4) + c. The four lanes of a quad share their
// rows. The A operand of the next product has the same order, so P needs no shuffle.
#pragma once

#include <cute/tensor.hpp>

#include "core/softmax_state.h"
#include "cuda/mask.h"

namespace flux::cuda::sm90 {

CUTLASS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class Scores>
CUTLASS_DEVICE void apply_mask(Scores& s, const RowMask (&mask)[2], int32_t kv_begin) {
  const int32_t base = kv_begin + 2 * int32_t(threadIdx.x % 4);
  CUTE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int32_t begin = mask[r].begin - base, last = mask[r].last - base, sink = mask[r].sink - base;
    CUTE_UNROLL
    for (int j = 0; j < size(s) / 4; ++j)
      CUTE_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int32_t col = 8 * j + c;
        const bool seen = (col <= last) & ((col >= begin) | (col < sink));  // as RowMask::sees, without branches
        s(4 * j + 2 * r + c) = seen ? s(4 * j + 2 * r + c) : -INFINITY;
      }
  }
}

// The running softmax of the rows. `sum` holds this thread's columns only until `finish`.
struct RowSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  // of the raw scores
  float sum[2] = {0.f, 0.f};
  float factor[2];  // brings what was accumulated before the last update to the new maximum

  // Replaces scores by probabilities relative to the running maximum.
  template <class Scores>
  CUTLASS_DEVICE void update(Scores& s, float scale_log2) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float m = max[r];
      CUTE_UNROLL
      for (int j = 0; j < size(s) / 4; ++j) m = fmaxf(m, fmaxf(s(4 * j + 2 * r), s(4 * j + 2 * r + 1)));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float base = m == -INFINITY ? 0.f : m * scale_log2;  // a row that has seen no key stays empty
      factor[r] = exp2_approx(max[r] * scale_log2 - base);
      max[r] = m;
      float add = 0.f;
      CUTE_UNROLL
      for (int j = 0; j < size(s) / 4; ++j)
        CUTE_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& x = s(4 * j + 2 * r + c);
          x = exp2_approx(x * scale_log2 - base);
          add += x;
        }
      sum[r] = sum[r] * factor[r] + add;
    }
  }

  template <class Output>
  CUTLASS_DEVICE void rescale(Output& o) const {
    CUTE_UNROLL
    for (int i = 0; i < size(o); ++i) o(i) *= factor[i / 2 % 2];
  }

  CUTLASS_DEVICE SoftmaxState finish(int r, float scale_log2) const {
    float total = sum[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    return {max[r] == -INFINITY ? -INFINITY : max[r] * scale_log2, total};
  }
};

}  // namespace flux::cuda::sm90
