// Which columns of a row a thread's accumulators hide, as bits of a word: column 8 * j + c, c in {0, 1}, is bit 2 * j +
// c. One instruction moves seven of them into predicates, where each comparison of a column with a bound would be one.
// VisibleKeys::contain (core/pattern.h) says the same of one column; cpp_tests/pattern_test.cpp compares them.
#pragma once

#include "core/pattern.h"

namespace flux::cuda {

// The columns from `begin` on, which is counted from the thread's first.
FLUX_HD uint32_t columns_from(int32_t begin) {
  const int32_t before = max_of(begin + 7, 0) / 8 + max_of(begin + 6, 0) / 8;  // with c = 0, with c = 1
#ifdef __CUDA_ARCH__
  return __funnelshift_lc(0u, ~0u, before);  // none from bit 32 on
#else
  return before < 32 ? ~0u << before : 0u;
#endif
}

// The columns that a row does not see; base: of the thread's first.
FLUX_HD uint32_t columns_hidden(const VisibleKeys& keys, int32_t base) {
  return columns_from(keys.last + 1 - base) | (columns_from(keys.sink - base) & ~columns_from(keys.begin - base));
}

}  // namespace flux::cuda
