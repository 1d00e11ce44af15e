// The end of a row: what was summed up becomes the output. For both families and for combine. (How the elements of a
// row lie in the registers of threads, and so the loops around this, differ.)
#pragma once

#include "core/schedule.h"
#include "core/softmax_state.h"
#include "cuda/addresses.h"
#include "cuda/element.h"

namespace flux::cuda {

// Normalises the outputs of a row. A row that sees no key is zero whatever was summed up, which may be 0 * NaN; where
// all visible scores are -inf the sum is 0 and the result NaN, as softmax has it.
struct RowNorm {
  bool sees_any;
  float factor;

  FLUX_HD RowNorm(bool sees_any, float factor) : sees_any(sees_any), factor(factor) {}
  FLUX_HD RowNorm(const TileView& v, const TileRow& r, const SoftmaxState& state)
      : RowNorm(v.sees_any(r.token), 1.f / state.sum) {}
  FLUX_HD float operator()(float x) const { return sees_any ? x * factor : 0.f; }
};

// Four neighbouring elements of a row of the output.
template <typename T>
__device__ inline uint2 pack_four(const RowNorm& norm, const float4& sum) {
  return {pack<T>(norm(sum.x), norm(sum.y)), pack<T>(norm(sum.z), norm(sum.w))};
}

__device__ inline float4 add_scaled(const float4& sum, const float4& x, float factor) {
  return {sum.x + x.x * factor, sum.y + x.y * factor, sum.z + x.z * factor, sum.w + x.w * factor};
}

}  // namespace flux::cuda
