// The two rows of a tile that one thread of a consumer warpgroup holds.
//
// WGMMA accumulators of 64 rows and N columns lie in registers as value[4 * j + 2 * r + c]: row
// 16 * warp + lane / 4 + 8 * r of the warpgroup, column 8 * j + 2 * (lane % 4) + c. The four lanes of a quad share
// their rows. The A operand of the next product has the same order, so P needs no shuffle.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/addresses.h"
#include "cuda/hidden_columns.h"
#include "cuda/softmax.h"

namespace flux::cuda::sm90 {

constexpr int kThreadRows = 2;

// Row of the tile.
CUTLASS_DEVICE int32_t thread_row(int warpgroup, int r, uint32_t thread = threadIdx.x) {
  return 64 * warpgroup + int32_t(thread % 128 / 32 * 16 + thread % 32 / 4) + 8 * r;
}

// Hides from the compiler that x is what it was, so that it computes anew what depends on x, where it would have kept
// that in registers all through the main loop.
template <class Int>
CUTLASS_DEVICE void forget(Int& x) {
  asm volatile("" : "+r"(x));
}

// threadIdx.x, for what is worked out once a tile: at head dimension 256 the main loop leaves no register to keep it
// in.
template <class T>
CUTLASS_DEVICE uint32_t thread_anew() {
  uint32_t thread = threadIdx.x;
  if constexpr (T::kHeadDim > 128) forget(thread);
  return thread;
}

// What stands in hidden columns of row r of a thread's two becomes x.
template <class Scores>
CUTLASS_DEVICE void overwrite(Scores& s, int r, uint32_t hidden, float x) {
  constexpr int kColumns = decltype(size(s))::value / kThreadRows;
  static_assert(kColumns <= 32, "a bit for each");
  CUTE_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    float& score = s(4 * (i / 2) + 2 * r + i % 2);
    score = hidden >> i & 1 ? x : score;
  }
}

// Scores of invisible pairs become -inf. The bounds of a row are worked out where they are needed, in one block of
// many: kept, they would cost registers. only_later: a query sees all keys up to its own, which is one bound; rows of
// padding then see some too, but nobody reads what they hold.
template <class Scores, class View>
CUTLASS_DEVICE void apply_mask(Scores& s, const View& v, bool only_later, uint32_t group_inverse, int warpgroup,
                               int32_t kv_begin) {
  const int32_t base = kv_begin + 2 * int32_t(threadIdx.x % 4);
  const auto token = [&](int r) { return token_of_row(thread_row(warpgroup, r), group_inverse); };
  uint32_t hidden[kThreadRows];
  if (only_later) {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) hidden[r] = columns_from(v.q_pos + token(r) + 1 - base);
  } else {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) hidden[r] = columns_hidden(v.visible_keys(token(r)), base);
  }
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) overwrite(s, r, hidden[r], -INFINITY);
}

struct ThreadSoftmax : OnlineSoftmax<kThreadRows> {
  float factor[kThreadRows];  // brings what was accumulated before the last update to the new maximum

  // Takes the scores of row r into the running maximum. Four maxima at a time: none waits for the one before it.
  template <class Scores>
  CUTLASS_DEVICE void raise_maximum(const Scores& s, int r, float scale_log2) {
    float largest[4];
    CUTE_UNROLL
    for (int j = 0; j < size(s) / 4; j += 2) CUTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float x = s(4 * (j + i / 2) + 2 * r + i % 2);
      largest[i] = j == 0 ? x : fmaxf(largest[i], x);
    }
    factor[r] = raise(r, fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])), scale_log2);
  }

  // Replaces the scores of row r by probabilities relative to the running maximum.
  template <class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& s, int r, float scale_log2) {
    const float down = shift(r, scale_log2);
    CUTE_UNROLL
    for (int j = 0; j < size(s) / 4; ++j) CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      float& x = s(4 * j + 2 * r + c);
      x = fast_exp2(x * scale_log2 - down);
      sum[r] += x;
    }
  }

  // For the rows of another tile; what was accumulated is still to be brought to the last maximum.
  CUTLASS_DEVICE void restart() {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) max[r] = -INFINITY, sum[r] = 0.f;
  }

  template <class Output>
  CUTLASS_DEVICE void rescale(Output& o, bool wanted = true) const {
    const float by[] = {wanted ? factor[0] : 1.f, wanted ? factor[1] : 1.f};
    CUTE_UNROLL
    for (int i = 0; i < size(o); ++i) o(i) *= by[i / 2 % 2];
  }
};

}  // namespace flux::cuda::sm90
