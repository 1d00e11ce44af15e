// One more token for every sequence head of a cache with fixed addresses.
#include <cstring>
#include <type_traits>

#include "cpu/cpu.h"
#include "cpu/element.h"

namespace flux::cpu {
namespace {

template <typename From, typename To>
void store_token(const From* from, To* to, int32_t dim) {
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, sizeof(To) * dim);
  else
    for (int32_t d = 0; d < dim; ++d) from_float(to_float(from[d]), to[d]);
}

// One token of head_dim elements, in the pool's dtype; or NaN.
void store_token(const AppendParams& p, bool nan, const void* x, DType dtype, int64_t index, void* pool, int64_t slot) {
  if (nan) {
    dispatch(p.pool_dtype, [&](auto* to) {
      using To = std::remove_pointer_t<decltype(to)>;
      const uint32_t bits = quiet_nan(p.pool_dtype);  // its low bytes come first
      for (int32_t d = 0; d < p.head_dim; ++d)
        std::memcpy(static_cast<To*>(pool) + slot * p.head_dim + d, &bits, sizeof(To));
    });
    return;
  }
  dispatch(dtype, [&](auto* from) {
    dispatch(p.pool_dtype, [&](auto* to) {
      using From = std::remove_pointer_t<decltype(from)>;
      using To = std::remove_pointer_t<decltype(to)>;
      store_token(static_cast<const From*>(x) + index, static_cast<To*>(pool) + slot * p.head_dim, p.head_dim);
    });
  });
}

}  // namespace

void append(const AppendParams& p, const Executor& executor) {
  executor.run(p.num_seq_heads(), [&](int64_t seq_head) {
    const AppendStep step(p, int32_t(seq_head));
    if (!step.active) return;
    const int64_t b = seq_head / p.num_kv_heads, h = seq_head % p.num_kv_heads;
    store_token(p, step.nan, p.k, p.k_dtype, b * p.k_stride.b + h * p.k_stride.h, p.k_pool, step.slot());
    store_token(p, step.nan, p.v, p.v_dtype, b * p.v_stride.b + h * p.v_stride.h, p.v_pool, step.slot());
    int32_t* table = p.page_table + seq_head * p.max_pages;
    for (int32_t i = 0; i < step.num_columns(); ++i) table[i] = step.column(i);
    p.kv_len[seq_head] = step.kv_len();
    ++p.seen[seq_head];
  });
  ++*p.slots;
}

}  // namespace flux::cpu
