// One row of a softmax that is computed piece by piece (Milakov and Gimelshein, arXiv 1805.02867): the
// running maximum and sum, in base 2. The unnormalised output lives with the kernel; `merge` returns the
// two factors that bring the outputs of two pieces to a common scale. Merging is associative, and the
// empty state is its neutral element.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace flux {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct MergeFactors {
  float ours, theirs;
};

struct alignas(8) SoftmaxState {  // loaded as one
  float max = -INFINITY;          // largest score so far, times log2(e)
  float sum = 0.f;                // sum of exp2(score - max)

  FLUX_HD bool empty() const { return max == -INFINITY && sum == 0.f; }

  // Natural logarithm of the sum of exponentials; -inf for a row that saw no key.
  FLUX_HD float lse() const { return empty() ? -INFINITY : (max + log2f(sum)) * kLn2; }

  FLUX_HD MergeFactors merge(const SoftmaxState& other) {
    if (other.empty()) return {1.f, 0.f};
    if (empty()) {
      *this = other;
      return {0.f, 1.f};
    }
    const float larger = max > other.max ? max : other.max;
    const MergeFactors f{exp2f(max - larger), exp2f(other.max - larger)};
    sum = sum * f.ours + other.sum * f.theirs;
    max = larger;
    return f;
  }
};

// The union of several states at once, so that no piece waits for the one before it; factor[i] brings the outputs of
// piece i to the common scale.
template <int n>
FLUX_HD SoftmaxState merge(const SoftmaxState (&states)[n], float (&factor)[n]) {
  SoftmaxState all;
  for (int i = 0; i < n; ++i) all.max = states[i].max > all.max ? states[i].max : all.max;
  for (int i = 0; i < n; ++i) {
    factor[i] = states[i].empty() ? 0.f : exp2f(states[i].max - all.max);
    all.sum += factor[i] * states[i].sum;
  }
  return all;
}

}  // namespace flux
