// Online softmax over tensor-core fragments: the state of a row and its update. The loops over a thread's scores are
// each family's own (sm80/fragments.h, sm90/thread_rows.h): which maxima and exponentials stand between which products
// decides how much of them hides behind the tensor cores.
#pragma once

#include "core/softmax_state.h"

namespace flux::cuda {

// exp2 by the special function unit alone (2 ulp; small results flush to 0).
__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x by the special function unit alone (1 ulp).
__device__ inline float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// Scores become scale_log2 * score. A scale that is not positive is moved into the scores themselves, because the
// running maximum is taken before scaling.
struct SoftmaxScale {
  float sign, log2;  // -1, 0 or 1, before the maximum is taken; |scale| * log2(e) > 0, in the exponent

  FLUX_HD explicit SoftmaxScale(float scale)
      : sign(scale > 0.f   ? 1.f
             : scale < 0.f ? -1.f
                           : 0.f),
        log2((scale == 0.f ? 1.f : fabsf(scale)) * kLog2e) {}
};

// Maximum and sum of kRows rows. The four lanes that share a row agree on the maximum; each sums its own columns.
template <int kRows>
struct OnlineSoftmax {
  float max[kRows];  // before scaling
  float sum[kRows];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) max[r] = -INFINITY, sum[r] = 0.f;
  }

  // Takes the largest new score of a row (of this lane); returns what old outputs must be multiplied by.
  __device__ float raise(int r, float largest, float scale_log2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const float raised = fmaxf(max[r], largest);
    const float factor = raised == max[r] ? 1.f : fast_exp2((max[r] - raised) * scale_log2);
    max[r] = raised;
    sum[r] *= factor;
    return factor;
  }

  // What to subtract from scaled scores; 0 while the row has seen no key, so that masked scores give 0, not NaN.
  __device__ float shift(int r, float scale_log2) const { return max[r] == -INFINITY ? 0.f : max[r] * scale_log2; }

  // The whole row's state, the same in its four lanes.
  __device__ SoftmaxState state(int r, float scale_log2) const {
    float total = sum[r] + __shfl_xor_sync(~0u, sum[r], 1);
    total += __shfl_xor_sync(~0u, total, 2);
    return {max[r] * scale_log2, total};
  }
};

}  // namespace flux::cuda
