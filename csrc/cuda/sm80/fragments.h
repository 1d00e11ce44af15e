// The two products and the softmax between them, on the fragments of one warp.
#pragma once

#include "cuda/element.h"
#include "cuda/sm80/tile.h"
#include "cuda/softmax.h"

namespace flux::cuda::sm80 {

// scores[m][n] of kRowTiles x 16 rows and kKeys keys. `left(a, m, k)` loads the fragment of row tile m, columns
// [16 k, 16 k + 16) of Q.
template <typename T, int kRowTiles, int kKeys, int kDim, typename Left>
__device__ void multiply_qk(float (&scores)[kRowTiles][kKeys / 8][4], SmemTile<kDim> keys, Left left) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.f;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) left(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      keys.right(b, 16 * n, 2 * k);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<T>(scores[m][2 * n], a[m], b[0], b[1]);
        mma<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int kRowTiles, int kKeys>
__device__ void apply_sign(float (&scores)[kRowTiles][kKeys / 8][4], const SoftmaxScale& scale) {
  if (scale.sign == 1.f) return;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] *= scale.sign;
}

// Scores of invisible pairs become -inf. keys_of(r): what row l / 4 + 8 * (r % 2) of row tile r / 2 sees, l the lane.
template <int kRowTiles, int kKeys, typename KeysOf>
__device__ void apply_mask(float (&scores)[kRowTiles][kKeys / 8][4], int32_t kv_begin, KeysOf keys_of) {
  const int32_t column = kv_begin + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const VisibleKeys keys = keys_of(r);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (!keys.contain(column + 8 * n + i)) scores[r / 2][n][r % 2 * 2 + i] = -INFINITY;
  }
}

// Scores become exp2(scaled score - maximum); outputs so far are brought to the new maximum.
template <int kRowTiles, int kKeys, int kDim>
__device__ void update_softmax(OnlineSoftmax<2 * kRowTiles>& softmax, float (&scores)[kRowTiles][kKeys / 8][4],
                               float (&out)[kRowTiles][kDim / 8][4], const SoftmaxScale& scale) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = 2 * m + half;
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
        largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      const float factor = softmax.raise(r, largest, scale.log2), shift = softmax.shift(r, scale.log2);
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[m][n][i] = fast_exp2(scores[m][n][i] * scale.log2 - shift);
          sum += scores[m][n][i];
        }
      softmax.sum[r] += sum;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) out[m][n][2 * half] *= factor, out[m][n][2 * half + 1] *= factor;
    }
}

// out += probabilities x values, of the first 8 * kOutTiles columns of the values.
template <typename T, int kRowTiles, int kKeys, int kOutTiles, int kDim>
__device__ void multiply_pv(float (&out)[kRowTiles][kOutTiles][4], const float (&p)[kRowTiles][kKeys / 8][4],
                            SmemTile<kDim> values) {
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[m][2 * k + i / 2][i % 2 * 2];
        a[m][i] = pack<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int n = 0; n < kOutTiles / 2; ++n) {
      uint32_t b[4];
      values.right_transposed(b, 16 * k, 2 * n);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<T>(out[m][2 * n], a[m], b[0], b[1]);
        mma<T>(out[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace flux::cuda::sm80
