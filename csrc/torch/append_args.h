// The arguments of `append` to its parameter struct, checked. Shared by the CPU and the CUDA operator.
#pragma once

#include <initializer_list>
#include <numeric>

#include "core/append.h"
#include "torch/convert.h"

namespace flux::torch_ops {

inline void check_append_tensor(const Tensor& t, const Tensor& k, ScalarType dtype, std::initializer_list<int64_t> want,
                                const char* name) {
  FLUX_CHECK(t.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.scalar_type()));
  FLUX_CHECK(t.is_cuda() == k.is_cuda() && t.get_device_index() == k.get_device_index(), name,
             " must be on the device of k (", device_of(k), "), got ", device_of(t));
  std::ostringstream shape;
  bool same = t.dim() == int64_t(want.size());
  int64_t d = 0;
  for (const int64_t n : want) {
    shape << (d ? ", " : "") << n;
    same = same && t.size(d) == n;
    ++d;
  }
  FLUX_CHECK(same && t.is_contiguous(), name, " must be contiguous [", shape.str(), "], got ",
             same ? "other strides" : shape_of(t));
}

// Checks everything that can be checked without reading the tensors, and fills the struct.
inline AppendParams to_append_params(const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool,
                                     const Tensor& base, const Tensor& ring, const Tensor& page_table,
                                     const Tensor& kv_len, const Tensor& seen, const Tensor& slots,
                                     const std::vector<int64_t>& pattern, int64_t max_cache_len,
                                     const OptionalTensor& active) {
  AppendParams p;
  FLUX_CHECK(k.dim() == 4 && k.size(2) == 1, "k must be one token per sequence and KV head [B, Hkv, 1, D], got ",
             shape_of(k));
  bool same = v.dim() == 4;
  for (int64_t i = 0; same && i < 4; ++i) same = v.size(i) == k.size(i);
  FLUX_CHECK(same, "v must have the shape of k (", shape_of(k), "), got ", shape_of(v));
  const int64_t batch = k.size(0), heads = k.size(1), dim = k.size(3);
  FLUX_CHECK(batch >= 1 && heads >= 1, "k must have at least one sequence and one KV head, got ", shape_of(k));
  FLUX_CHECK(dim >= 1 && dim <= kMaxHeadDim, "head_dim must be from 1 to ", kMaxHeadDim, ", got ", dim);
  p.k_dtype = to_dtype(k, "k");
  p.v_dtype = to_dtype(v, "v");
  FLUX_CHECK(v.is_cuda() == k.is_cuda() && v.get_device_index() == k.get_device_index(),
             "v must be on the device of k (", device_of(k), "), got ", device_of(v));
  check_last_contiguous(k, "k");
  check_last_contiguous(v, "v");

  FLUX_CHECK(k_pool.dim() == 4, "k_pool must be [num_pages, page_size, 1, D], got ", shape_of(k_pool));
  const int64_t pages = k_pool.size(0), page_size = k_pool.size(1);
  FLUX_CHECK(pages >= 1 && page_size >= 1, "k_pool must have at least one page of at least one token, got ",
             shape_of(k_pool));
  p.pool_dtype = to_dtype(k_pool, "k_pool");
  check_append_tensor(k_pool, k, k_pool.scalar_type(), {pages, page_size, 1, dim}, "k_pool");
  check_append_tensor(v_pool, k, k_pool.scalar_type(), {pages, page_size, 1, dim}, "v_pool");
  FLUX_CHECK(v_pool.const_data_ptr() != k_pool.const_data_ptr(), "v_pool must not be k_pool");
  check_append_tensor(base, k, ScalarType::Int, {batch, heads}, "base");
  check_append_tensor(ring, k, ScalarType::Int, {batch, heads}, "ring");
  FLUX_CHECK(page_table.dim() == 3, "page_table must be [B, Hkv, max_pages], got ", shape_of(page_table));
  check_append_tensor(page_table, k, ScalarType::Int, {batch, heads, page_table.size(2)}, "page_table");
  check_append_tensor(kv_len, k, ScalarType::Int, {batch, heads}, "kv_len");
  check_append_tensor(seen, k, ScalarType::Int, {batch, heads}, "seen");
  check_append_tensor(slots, k, ScalarType::Long, {}, "slots");
  if (active) check_append_tensor(*active, k, ScalarType::Int, {batch}, "active");

  FLUX_CHECK(pattern.size() == 4, "pattern must hold 4 integers (sink, window, last_q, align), got ", pattern.size());
  p.pattern = to_pattern(pattern.data(), "pattern");
  FLUX_CHECK(p.pattern.last_q == 0, "pattern.last_q must be 0: a step is not the end of a prompt, got ",
             p.pattern.last_q);
  p.batch = to_int32(batch, "batch");
  p.num_kv_heads = to_int32(heads, "the number of heads");
  to_int32(batch * heads, "batch times heads");
  p.head_dim = int32_t(dim);
  p.num_pages = to_int32(pages, "num_pages");
  p.page_size = to_int32(page_size, "page_size");
  p.max_pages = to_int32(page_table.size(2), "max_pages");
  const int64_t room = page_table.size(2) * page_size;
  FLUX_CHECK(max_cache_len >= 1 && max_cache_len <= room, "max_cache_len must be from 1 to the ", room,
             " tokens of the page_table, got ", max_cache_len);
  FLUX_CHECK(max_cache_len <= kUnlimited, "max_cache_len must be at most ", kUnlimited, ", got ", max_cache_len);
  p.max_cache_len = int32_t(max_cache_len);
  p.sink_pages = int32_t((p.pattern.sink + page_size - 1) / page_size);
  const int64_t unit = std::lcm(int64_t(p.pattern.align), page_size);
  p.unit = int32_t(unit < kUnlimited ? unit : kUnlimited);  // beyond every length: nothing is ever dropped

  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_stride = {k.stride(0), 0, k.stride(1)};
  p.v_stride = {v.stride(0), 0, v.stride(1)};
  p.k_pool = k_pool.mutable_data_ptr();
  p.v_pool = v_pool.mutable_data_ptr();
  p.base = base.const_data_ptr<int32_t>();
  p.ring = ring.const_data_ptr<int32_t>();
  p.page_table = page_table.mutable_data_ptr<int32_t>();
  p.kv_len = kv_len.mutable_data_ptr<int32_t>();
  p.seen = seen.mutable_data_ptr<int32_t>();
  p.slots = slots.mutable_data_ptr<int64_t>();
  if (active) p.active = active->const_data_ptr<int32_t>();
  return p;
}

// On the CPU, also what stands inside the tensors.
inline void check_values(const AppendParams& p) {
  for (int32_t seq_head = 0; seq_head < p.num_seq_heads(); ++seq_head) {
    const int32_t b = seq_head / p.num_kv_heads, h = seq_head % p.num_kv_heads;
    const auto check = [&](bool ok, const char* rule, int64_t bound, int32_t value) {
      FLUX_CHECK(ok, rule, bound, ", got ", value, " for sequence ", b, ", head ", h);
    };
    if (p.active && h == 0)
      FLUX_CHECK(p.active[b] >= -1 && p.active[b] <= 1, "active must be 1, 0 or -1, got ", p.active[b],
                 " for sequence ", b);
    check(p.seen[seq_head] >= 0, "seen must be at least ", 0, p.seen[seq_head]);
    check(p.ring[seq_head] >= 1, "ring must be at least ", 1, p.ring[seq_head]);
    check(p.base[seq_head] >= 0, "base must be at least ", 0, p.base[seq_head]);
    const AppendStep step(p, seq_head);
    const int64_t most = int64_t(p.pattern.window) + p.unit - 1;  // tokens between the gap and the end
    const int64_t needed = (most + p.page_size - 1) / p.page_size;
    check(!step.drops || step.ring >= needed, "ring must hold the pages of the window, at least ", needed, step.ring);
    const int64_t run = min_of(p.max_pages, step.drops ? step.sink_pages + step.ring : p.max_pages);
    check(p.base[seq_head] + run <= p.num_pages, "base must leave room for the pages of the run, at most ",
          p.num_pages - run, p.base[seq_head]);
  }
}

}  // namespace flux::torch_ops
