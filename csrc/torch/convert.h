// Tensors to parameter structs, checked. Shared by the CPU and the CUDA operators.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/params.h"
#include "torch/checks.h"

namespace flux::torch_ops {

using OptionalTensor = std::optional<Tensor>;

// The kernels find an entry of the routes and row bounds by offsets of 32 bits. A view that reaches further than that
// into its memory is copied: these tensors are tiny.
inline OptionalTensor near(const OptionalTensor& t) {
  if (!t) return t;
  constexpr int64_t kReach = std::numeric_limits<int32_t>::max();
  int64_t reach = 0;
  for (int64_t d = 0; d < t->dim() && reach <= kReach; ++d)
    if (t->size(d) > 1) reach = t->stride(d) > kReach ? t->stride(d) : reach + (t->size(d) - 1) * t->stride(d);
  if (reach <= kReach) return t;
  Tensor copy = torch::stable::new_empty(*t, t->sizes());
  return torch::stable::copy_(copy, *t);
}

// The arguments of `attend` after q, k, v, in the order of the schema; routes and row bounds made `near`.
struct AttendArgs {
  OptionalTensor route;
  const std::vector<int64_t>& patterns;
  const OptionalTensor& full_blocks;
  const OptionalTensor& full_counts;
  const OptionalTensor& sparse_blocks;
  const OptionalTensor& sparse_counts;
  double scale;
  OptionalTensor q_begin, q_end, kv_begin, kv_end;
  const OptionalTensor& page_table;
};

constexpr int kMaxHeadDim = 256;
constexpr int kPatternNumbers = 5;  // sink, window, last_q, align, block list width

inline DType to_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      break;
  }
  FLUX_CHECK(false, name, " must be float16, bfloat16 or float32, got ", name_of(t.scalar_type()));
  return {};
}

inline int32_t to_int32(int64_t value, const char* name) {
  FLUX_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, " must fit in 31 bits, got ", value);
  return int32_t(value);
}

// Strides of [.., S, H, D], with or without the leading dimension.
// A dimension of one entry may have any stride; nothing may depend on it.
inline Strides strides_of(const Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
  const int64_t n = t.dim();
  return {n == 4 ? stride(0) : 0, stride(n - 3), stride(n - 2)};
}

inline void check_bounds_shape(const Tensor& t, int64_t batch, int64_t heads, bool per_head, const char* name) {
  FLUX_CHECK(
      (t.dim() == 1 && t.size(0) == batch) || (per_head && t.dim() == 2 && t.size(0) == batch && t.size(1) == heads),
      name, " must be [", batch, "]",
      per_head ? " or [" + std::to_string(batch) + ", " + std::to_string(heads) + "]" : "", ", got ", shape_of(t));
}

// Rows are counted, and positions compared with windows that have no end, in 32 bits.
inline int32_t to_rows(int64_t rows, const char* name) {
  FLUX_CHECK(rows <= kUnlimited, name, " must have at most ", kUnlimited, " rows, got ", rows);
  return int32_t(rows);
}

// Bounds of packed sequences that follow each other: sequence b has the rows [cu_seqlens[b], cu_seqlens[b + 1]).
inline RowSpans to_spans(const Tensor& cu_seqlens, const Tensor& q, int64_t batch, int32_t capacity) {
  check_index_tensor(cu_seqlens, q, "cu_seqlens");
  FLUX_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) == batch + 1, "cu_seqlens must be [", batch + 1, "], got ",
             shape_of(cu_seqlens));
  RowSpans s;
  s.capacity = capacity;
  s.begin = cu_seqlens.const_data_ptr<int32_t>();
  s.begin_stride_b = s.end_stride_b = int32_t(cu_seqlens.stride(0));
  s.end = s.begin + s.begin_stride_b;
  return s;
}

inline RowSpans to_spans(const OptionalTensor& begin, const OptionalTensor& end, const Tensor& q, int64_t batch,
                         int64_t heads, int32_t capacity, bool per_head, const char* begin_name, const char* end_name) {
  RowSpans s;
  s.capacity = capacity;
  if (begin) {
    check_index_tensor(*begin, q, begin_name);
    check_bounds_shape(*begin, batch, heads, per_head, begin_name);
    s.begin = begin->const_data_ptr<int32_t>();
    s.begin_stride_b = int32_t(begin->stride(0));
    s.begin_stride_h = begin->dim() == 2 ? int32_t(begin->stride(1)) : 0;
  }
  if (end) {
    check_index_tensor(*end, q, end_name);
    check_bounds_shape(*end, batch, heads, per_head, end_name);
    s.end = end->const_data_ptr<int32_t>();
    s.end_stride_b = int32_t(end->stride(0));
    s.end_stride_h = end->dim() == 2 ? int32_t(end->stride(1)) : 0;
  }
  return s;
}

inline BlockTable to_block_table(const OptionalTensor& blocks, const OptionalTensor& counts, int64_t width,
                                 const Tensor& q, const ProblemShape& shape, const char* name) {
  if (!blocks) {
    FLUX_CHECK(!counts, name, ".counts without ", name, ".blocks");
    return {};
  }
  BlockTable t;
  check_index_tensor(*blocks, q, name);
  t.q_blocks = ceil_div(shape.max_q_len, t.q_width);
  FLUX_CHECK(blocks->dim() == 4 && blocks->size(0) == shape.batch && blocks->size(1) == shape.num_kv_heads &&
                 blocks->size(2) == t.q_blocks && blocks->is_contiguous(),
             name, ".blocks must be contiguous [", shape.batch, ", ", shape.num_kv_heads, ", ", t.q_blocks,
             ", max_count], got ", shape_of(*blocks));
  FLUX_CHECK(blocks->size(3) >= 1 || t.q_blocks == 0, name, ".blocks must have room for at least one block, got ",
             shape_of(*blocks));
  FLUX_CHECK(counts.has_value(), name, ".blocks needs ", name, ".counts");
  check_index_tensor(*counts, q, name);
  FLUX_CHECK(counts->dim() == 3 && counts->size(0) == shape.batch && counts->size(1) == shape.num_kv_heads &&
                 counts->size(2) == t.q_blocks && counts->is_contiguous(),
             name, ".counts must be contiguous [", shape.batch, ", ", shape.num_kv_heads, ", ", t.q_blocks, "], got ",
             shape_of(*counts));
  FLUX_CHECK(width == 64 || width == 128, name, ".width must be 64 or 128, got ", width);
  t.blocks = blocks->const_data_ptr<int32_t>();
  t.counts = counts->const_data_ptr<int32_t>();
  t.max_count = to_int32(blocks->size(3), name);
  t.kv_width = int32_t(width);
  return t;
}

inline Pattern to_pattern(const int64_t* n, const char* name) {
  FLUX_CHECK(n[0] >= 0, name, ".sink must be >= 0, got ", n[0]);
  FLUX_CHECK(n[3] >= 1, name, ".align must be >= 1, got ", n[3]);
  FLUX_CHECK(n[1] >= 1 && n[1] % n[3] == 0, name, ".window must be a positive multiple of align (", n[3], "), got ",
             n[1]);
  FLUX_CHECK(n[2] >= 0, name, ".last_q must be >= 0, got ", n[2]);
  const auto clamp = [](int64_t x) { return int32_t(x < kUnlimited ? x : kUnlimited); };
  if (n[1] >= kUnlimited) return {clamp(n[0]), kUnlimited, clamp(n[2]), 1};  // reaches every key, wherever it begins
  return {clamp(n[0]), clamp(n[1]), clamp(n[2]), clamp(n[3])};
}

// Checks everything that can be checked without reading device memory, and fills the struct (but for out, lse).
inline AttendParams to_attend_params(const Tensor& q, const Tensor& k, const Tensor& v, const AttendArgs& a) {
  AttendParams p;
  ProblemShape& s = p.shape;
  const bool paged = a.page_table.has_value();
  const bool packed = q.dim() == 3;
  FLUX_CHECK(q.dim() == 4 || packed, "q must be [B, S, Hq, D] or packed [T, Hq, D], got ", shape_of(q));
  const bool packed_kv = packed && !paged && k.dim() == 3;
  const int64_t want = packed_kv ? 3 : 4;
  const char* kv_shape = paged       ? "[num_pages, page_size, Hkv, D]"
                         : packed_kv ? "[T, Hkv, D]"
                         : packed    ? "packed [T, Hkv, D] or a cache [B, Skv, Hkv, D]"
                                     : "[B, Skv, Hkv, D]";
  FLUX_CHECK(k.dim() == want, "k must be ", kv_shape, ", got ", shape_of(k));
  FLUX_CHECK(v.dim() == want, "v must be ", kv_shape, ", got ", shape_of(v));
  for (int64_t i = 0; i < want; ++i)
    FLUX_CHECK(k.size(i) == v.size(i), "v must have the shape of k (", shape_of(k), "), got ", shape_of(v));
  p.dtype = to_dtype(q, "q");
  check_like(k, q, "k", "q");
  check_like(v, q, "v", "q");
  check_last_contiguous(q, "q");
  check_last_contiguous(k, "k");
  check_last_contiguous(v, "v");

  const int64_t dim = q.size(q.dim() - 1), heads = q.size(q.dim() - 2);
  FLUX_CHECK(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0, "head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim,
             ", got ", dim);
  FLUX_CHECK(k.size(want - 1) == dim, "k must have the head_dim of q (", dim, "), got ", k.size(want - 1));
  int64_t kv_heads = k.size(want - 2);
  if (packed) {
    FLUX_CHECK(a.q_begin, "a packed q [T, Hq, D] needs the row bounds of its sequences (cu_seqlens)");
    FLUX_CHECK(a.q_begin->dim() == 1, a.q_end ? "q_begin must be [B], got " : "cu_seqlens must be [B + 1], got ",
               shape_of(*a.q_begin));
    FLUX_CHECK(a.q_end || a.q_begin->size(0) >= 1, "cu_seqlens must be [B + 1], got ", shape_of(*a.q_begin));
  }
  FLUX_CHECK(!packed_kv || a.kv_begin, "a packed k [T, Hkv, D] needs the row bounds of its sequences");
  const int64_t batch = packed ? a.q_begin->size(0) - (a.q_end ? 0 : 1) : q.size(0);
  if (paged) {
    const Tensor& t = *a.page_table;
    check_index_tensor(t, q, "page_table");
    FLUX_CHECK((t.dim() == 2 || t.dim() == 3) && t.size(0) == batch, "page_table must be [", batch, ", max_pages] or [",
               batch, ", Hkv, max_pages], got ", shape_of(t));
    FLUX_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1,
               "page_table must have a contiguous last dimension, got stride ", t.stride(t.dim() - 1));
    if (t.dim() == 3) {
      FLUX_CHECK(kv_heads == 1, "a page_table per head [B, Hkv, max_pages] goes with pages of one head, got ",
                 kv_heads);
      kv_heads = t.size(1);
    }
    FLUX_CHECK(a.kv_end, "page_table needs kv_len");
    p.page_table = t.const_data_ptr<int32_t>();
    p.page_stride_b = t.stride(0);
    p.page_stride_h = t.dim() == 3 ? t.stride(1) : 0;
    p.pages_per_head = t.dim() == 3;
    p.page_size = to_int32(k.size(1), "page_size");
    FLUX_CHECK(p.page_size >= 1, "page_size must be >= 1, got ", p.page_size);
    p.num_pages = to_int32(k.size(0), "num_pages");
  } else if (!packed_kv) {
    FLUX_CHECK(k.size(0) == batch, "k must have the batch of q (", batch, "), got ", k.size(0));
  }
  FLUX_CHECK(kv_heads >= 1, "k must have at least one head, got ", kv_heads);
  FLUX_CHECK(heads >= 1 && heads % kv_heads == 0, "the query heads (", heads, ") must be a multiple of the key heads (",
             kv_heads, "), one each at least: tensors are [B, S, H, D], tokens before heads");

  s.batch = to_int32(batch, "batch");
  s.num_q_heads = to_int32(heads, "the number of query heads");
  s.num_kv_heads = int32_t(kv_heads);
  to_int32(batch * kv_heads, "batch times key heads");
  s.head_dim = int32_t(dim);
  const int64_t rows = q.size(q.dim() - 3);
  s.max_q_len = to_rows(rows, "q");
  s.total_q_rows = packed ? rows : batch * rows;
  const int64_t kv_rows = paged ? a.page_table->size(a.page_table->dim() - 1) * k.size(1) : k.size(want - 3);
  const int32_t capacity = to_rows(kv_rows, paged ? "the pages of page_table" : "k");
  s.q_rows = packed && !a.q_end
                 ? to_spans(*a.q_begin, q, batch, s.max_q_len)
                 : to_spans(a.q_begin, a.q_end, q, batch, kv_heads, s.max_q_len, false, "q_begin", "q_end");
  s.kv_rows = packed_kv && !a.kv_end
                  ? to_spans(*a.kv_begin, q, batch, capacity)
                  : to_spans(a.kv_begin, a.kv_end, q, batch, kv_heads, capacity, true, "kv_begin", "kv_len");

  if (a.route) {
    const Tensor& r = *a.route;
    check_index_tensor(r, q, "route");
    FLUX_CHECK((r.dim() == 1 && r.size(0) == batch) || (r.dim() == 2 && r.size(0) == batch && r.size(1) == kv_heads),
               "route must be [", batch, "] or [", batch, ", ", kv_heads, "], got ", shape_of(r));
    s.route = r.const_data_ptr<int32_t>();
    s.route_stride_b = int32_t(r.stride(0));
    s.route_stride_h = r.dim() == 2 ? int32_t(r.stride(1)) : 0;
  }
  FLUX_CHECK(a.patterns.size() == 2 * kPatternNumbers, "patterns must hold ", 2 * kPatternNumbers, " integers, got ",
             a.patterns.size());
  s.patterns[0] = to_pattern(a.patterns.data(), "full");
  s.patterns[1] = to_pattern(a.patterns.data() + kPatternNumbers, "sparse");
  s.blocks[0] = to_block_table(a.full_blocks, a.full_counts, a.patterns[kPatternNumbers - 1], q, s, "full");
  s.blocks[1] = to_block_table(a.sparse_blocks, a.sparse_counts, a.patterns[2 * kPatternNumbers - 1], q, s, "sparse");

  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_stride = strides_of(q);
  p.k_stride = strides_of(k);
  p.v_stride = strides_of(v);
  p.scale = float(a.scale);
  FLUX_CHECK(std::isfinite(p.scale), "scale must be a finite number in 32 bits, got ", a.scale);
  return p;
}

inline void set_outputs(AttendParams& p, const Tensor& out, const Tensor& lse) {
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.out_stride = strides_of(out);
  const int64_t n = lse.dim();
  p.lse_stride = {n == 3 ? lse.stride(0) : 0, lse.stride(n - 1), lse.stride(n - 2)};
}

// out and lse of `attend`. Rows that belong to no sequence must read 0 and -inf, so where row bounds are given
// (and could leave gaps) the tensors start so.
inline std::tuple<Tensor, Tensor> make_outputs(const Tensor& q, bool may_have_gaps) {
  const int64_t n = q.dim();
  std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  std::vector<int64_t> lse_sizes(sizes.begin(), sizes.end() - 3);
  lse_sizes.insert(lse_sizes.end(), {q.size(n - 2), q.size(n - 3)});
  Tensor out = may_have_gaps ? torch::stable::new_zeros(q, sizes) : torch::stable::new_empty(q, sizes);
  Tensor lse = torch::stable::new_empty(q, lse_sizes, ScalarType::Float);
  if (may_have_gaps) torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  return {out, lse};
}

inline AttendBackwardParams to_backward_params(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                               const Tensor& v, const Tensor& out, const Tensor& lse,
                                               const AttendArgs& a, const Tensor& grad_q, const Tensor& grad_k,
                                               const Tensor& grad_v) {
  FLUX_CHECK(!a.page_table, "attend_backward takes no page_table");
  AttendBackwardParams p;
  p.forward = to_attend_params(q, k, v, a);
  check_like(grad_out, q, "grad_out", "q");
  check_like(out, q, "out", "q");
  check_last_contiguous(grad_out, "grad_out");
  check_last_contiguous(out, "out");
  check_shape(grad_out, q, "grad_out");
  check_shape(out, q, "out");
  FLUX_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == q.dim() - 1 &&
                 lse.size(lse.dim() - 1) == q.size(q.dim() - 3) && lse.size(lse.dim() - 2) == q.size(q.dim() - 2) &&
                 (q.dim() == 3 || lse.size(0) == q.size(0)),
             "lse must be float32 [B, Hq, S], as attend returned it, got ", shape_of(lse));
  set_outputs(p.forward, out, lse);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_stride = strides_of(grad_out);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_q_stride = strides_of(grad_q);
  p.grad_k_stride = strides_of(grad_k);
  p.grad_v_stride = strides_of(grad_v);
  return p;
}

inline RouteParams to_route_params(const Tensor& x, const std::vector<Tensor>& weights, int64_t pool_size,
                                   bool per_head, const OptionalTensor& begin, const OptionalTensor& end) {
  RouteParams p;
  const bool packed = x.dim() == 3;
  FLUX_CHECK(x.dim() == 4 || packed, "x must be [B, S, H, D] or packed [T, H, D], got ", shape_of(x));
  FLUX_CHECK(!packed || (begin && end), "a packed x [T, H, D] needs begin and end");
  FLUX_CHECK(!packed || begin->dim() == 1, "begin must be [B], got ", shape_of(*begin));
  check_last_contiguous(x, "x");
  p.dtype = to_dtype(x, "x");
  const int64_t n = x.dim();
  const int64_t batch = packed ? begin->size(0) : x.size(0);
  p.batch = to_int32(batch, "batch");
  p.num_heads = to_int32(x.size(n - 2), "the number of heads");
  to_int32(batch * p.num_heads, "batch times heads");
  p.head_dim = to_int32(x.size(n - 1), "head_dim");
  FLUX_CHECK(p.head_dim >= 1, "x must have a head_dim of at least 1, got ", shape_of(x));
  FLUX_CHECK(p.num_heads >= 1, "x must have at least one head, got ", shape_of(x));
  FLUX_CHECK(pool_size >= 1, "pool_size must be >= 1, got ", pool_size);
  const int32_t rows = to_rows(x.size(n - 3), "x");
  p.pool_size = int32_t(pool_size < kUnlimited ? pool_size : kUnlimited);
  to_int32(int64_t(2) * min_of(p.pool_size, rows) * p.num_heads, "the number of pooled rows of all heads");
  p.per_head = per_head;
  p.x = x.const_data_ptr();
  p.x_stride = strides_of(x);
  p.rows = to_spans(begin, end, x, batch, 1, rows, false, "begin", "end");
  FLUX_CHECK(weights.size() == 2 * kRouterLayers, "weights must be ", 2 * kRouterLayers,
             " tensors (weight and bias of five layers), got ", weights.size());
  p.weight_dtype = to_dtype(weights[0], "weights[0]");
  int64_t in = p.head_dim;
  for (int i = 0; i < kRouterLayers; ++i) {
    const Tensor &w = weights[2 * i], &b = weights[2 * i + 1];
    const std::string name = "weights[" + std::to_string(2 * i) + "]";
    check_like(w, weights[0], name.c_str(), "weights[0]");
    check_like(b, weights[0], "a bias", "weights[0]");
    FLUX_CHECK(w.is_cuda() == x.is_cuda() && w.get_device_index() == x.get_device_index(), name,
               " must be on the device of x (", device_of(x), "), got ", device_of(w));
    FLUX_CHECK(w.dim() == 2 && w.size(1) == in && w.is_contiguous(), name, " must be contiguous [out, ", in, "], got ",
               shape_of(w));
    FLUX_CHECK(b.dim() == 1 && b.size(0) == w.size(0) && b.is_contiguous(), "weights[", 2 * i + 1, "] must be [",
               w.size(0), "], got ", shape_of(b));
    p.layers[i] = {w.const_data_ptr(), b.const_data_ptr(), int32_t(in), to_int32(w.size(0), "a layer's width")};
    in = w.size(0);
  }
  FLUX_CHECK(in == 2, "the last layer of a router has 2 outputs, got ", in);
  return p;
}

// pooled, logits and decisions of `route`, allocated and put into its parameters.
inline std::tuple<Tensor, Tensor, Tensor> make_route_outputs(RouteParams& p, const Tensor& x) {
  std::vector<int64_t> leading{p.batch};
  if (p.per_head) leading.push_back(p.num_heads);
  std::vector<int64_t> pooled_sizes = leading, logit_sizes = leading;
  pooled_sizes.push_back(p.head_dim);
  logit_sizes.push_back(2);
  Tensor pooled = torch::stable::new_empty(x, pooled_sizes, ScalarType::Float);
  Tensor logits = torch::stable::new_empty(x, logit_sizes, ScalarType::Float);
  Tensor decision = torch::stable::new_empty(x, leading, ScalarType::Int);
  p.pooled = pooled.mutable_data_ptr<float>();
  p.logits = logits.mutable_data_ptr<float>();
  p.route = decision.mutable_data_ptr<int32_t>();
  return {pooled, logits, decision};
}

}  // namespace flux::torch_ops
