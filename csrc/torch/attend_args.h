// The arguments of `attend` and its relatives, to their parameter structs, checked. Shared by the CPU and the CUDA
// operators.
#pragma once

#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "core/explanation.h"
#include "torch/convert.h"

namespace flux::torch_ops {

constexpr int kPatternNumbers = 5;  // sink, window, last_q, align, block list width

// The arguments of `attend`, in the order of the schema; routes and row bounds made `near`.
struct AttendArgs {
  const Tensor &q, &k, &v;
  OptionalTensor route;
  const std::vector<int64_t>& patterns;
  const OptionalTensor &full_blocks, &full_counts, &sparse_blocks, &sparse_counts;
  double scale;
  OptionalTensor q_begin, q_end, kv_begin, kv_end;
  const OptionalTensor& page_table;
};

// An operator with the schema of `attend`, from a function of AttendArgs: the one place that spells them out.
template <auto kOperator>
auto with_attend_args(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor route,
                      std::vector<int64_t> patterns, OptionalTensor full_blocks, OptionalTensor full_counts,
                      OptionalTensor sparse_blocks, OptionalTensor sparse_counts, double scale, OptionalTensor q_begin,
                      OptionalTensor q_end, OptionalTensor kv_begin, OptionalTensor kv_end, OptionalTensor page_table) {
  return kOperator(AttendArgs{q, k, v, near(route), patterns, full_blocks, full_counts, sparse_blocks, sparse_counts,
                              scale, near(q_begin), near(q_end), near(kv_begin), near(kv_end), page_table});
}

// The same for `attend_backward`, from a function of BackwardArgs.
struct BackwardArgs {
  const Tensor &grad_out, &out, &lse;
  AttendArgs forward;
};
template <auto kOperator>
auto with_backward_args(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& lse, OptionalTensor route, std::vector<int64_t> patterns,
                        OptionalTensor full_blocks, OptionalTensor full_counts, OptionalTensor sparse_blocks,
                        OptionalTensor sparse_counts, double scale, OptionalTensor q_begin, OptionalTensor q_end,
                        OptionalTensor kv_begin, OptionalTensor kv_end) {
  const OptionalTensor no_pages;
  return kOperator(BackwardArgs{grad_out,
                                out,
                                lse,
                                {q, k, v, near(route), patterns, full_blocks, full_counts, sparse_blocks, sparse_counts,
                                 scale, near(q_begin), near(q_end), near(kv_begin), near(kv_end), no_pages}});
}

inline View view_of(const Tensor& t) { return {t.const_data_ptr(), strides_of(t)}; }
inline MutableView mutable_view_of(const Tensor& t) { return {t.mutable_data_ptr(), strides_of(t)}; }

inline BlockTable to_block_table(const OptionalTensor& blocks, const OptionalTensor& counts, int64_t width,
                                 const Tensor& q, const AttendParams& p, const char* name) {
  if (!blocks) {
    FLUX_CHECK(!counts, name, ".counts without ", name, ".blocks");
    return {};
  }
  BlockTable t;
  check_index_tensor(*blocks, q, name);
  t.q_blocks = ceil_div(p.q.max_len, t.q_width);
  FLUX_CHECK(blocks->dim() == 4 && blocks->size(0) == p.batch && blocks->size(1) == p.kv.num_heads &&
                 blocks->size(2) == t.q_blocks && blocks->is_contiguous(),
             name, ".blocks must be contiguous [", p.batch, ", ", p.kv.num_heads, ", ", t.q_blocks,
             ", max_count], got ", shape_of(*blocks));
  FLUX_CHECK(blocks->size(3) >= 1 || t.q_blocks == 0, name, ".blocks must have room for at least one block, got ",
             shape_of(*blocks));
  FLUX_CHECK(counts.has_value(), name, ".blocks needs ", name, ".counts");
  check_index_tensor(*counts, q, name);
  FLUX_CHECK(counts->dim() == 3 && counts->size(0) == p.batch && counts->size(1) == p.kv.num_heads &&
                 counts->size(2) == t.q_blocks && counts->is_contiguous(),
             name, ".counts must be contiguous [", p.batch, ", ", p.kv.num_heads, ", ", t.q_blocks, "], got ",
             shape_of(*counts));
  FLUX_CHECK(width == 64 || width == 128, name, ".width must be 64 or 128, got ", width);
  t.blocks = blocks->const_data_ptr<int32_t>();
  t.counts = counts->const_data_ptr<int32_t>();
  t.max_count = to_int32(blocks->size(3), name);
  t.kv_width = int32_t(width);
  return t;
}

// How the tensors of a call are laid out.
struct Layout {
  bool packed, packed_kv, paged;  // packed: [T, H, D] without a dimension for sequences
  int64_t batch;
};

inline Layout to_layout(const AttendArgs& a) {
  const Tensor &q = a.q, &k = a.k, &v = a.v;
  Layout x;
  x.paged = a.page_table.has_value();
  x.packed = q.dim() == 3;
  FLUX_CHECK(q.dim() == 4 || x.packed, "q must be [B, S, Hq, D] or packed [T, Hq, D], got ", shape_of(q));
  x.packed_kv = x.packed && !x.paged && k.dim() == 3;
  const int64_t want = x.packed_kv ? 3 : 4;
  const char* kv_shape = x.paged       ? "[num_pages, page_size, Hkv, D]"
                         : x.packed_kv ? "[T, Hkv, D]"
                         : x.packed    ? "packed [T, Hkv, D] or a cache [B, Skv, Hkv, D]"
                                       : "[B, Skv, Hkv, D]";
  FLUX_CHECK(k.dim() == want, "k must be ", kv_shape, ", got ", shape_of(k));
  FLUX_CHECK(v.dim() == want, "v must be ", kv_shape, ", got ", shape_of(v));
  for (int64_t i = 0; i < want; ++i)
    FLUX_CHECK(k.size(i) == v.size(i), "v must have the shape of k (", shape_of(k), "), got ", shape_of(v));
  to_dtype(q, "q");
  check_like(k, q, "k", "q");
  check_like(v, q, "v", "q");
  check_last_contiguous(q, "q");
  check_last_contiguous(k, "k");
  check_last_contiguous(v, "v");
  const int64_t dim = q.size(q.dim() - 1);
  FLUX_CHECK(dim >= 8 && dim <= kMaxHeadDim && dim % 8 == 0, "head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim,
             ", got ", dim);
  FLUX_CHECK(k.size(want - 1) == dim, "k must have the head_dim of q (", dim, "), got ", k.size(want - 1));
  if (x.packed) {
    FLUX_CHECK(a.q_begin, "a packed q [T, Hq, D] needs the row bounds of its sequences (cu_seqlens)");
    FLUX_CHECK(a.q_begin->dim() == 1, a.q_end ? "q_begin must be [B], got " : "cu_seqlens must be [B + 1], got ",
               shape_of(*a.q_begin));
    FLUX_CHECK(a.q_end || a.q_begin->size(0) >= 1, "cu_seqlens must be [B + 1], got ", shape_of(*a.q_begin));
  }
  FLUX_CHECK(!x.packed_kv || a.kv_begin, "a packed k [T, Hkv, D] needs the row bounds of its sequences");
  x.batch = x.packed ? a.q_begin->size(0) - (a.q_end ? 0 : 1) : q.size(0);
  FLUX_CHECK(x.packed_kv || x.paged || k.size(0) == x.batch, "k must have the batch of q (", x.batch, "), got ",
             k.size(0));
  return x;
}

inline Queries to_queries(const AttendArgs& a, const Layout& x) {
  const Tensor& q = a.q;
  Queries queries;
  queries.data = q.const_data_ptr();
  queries.stride = strides_of(q);
  queries.num_heads = to_int32(q.size(q.dim() - 2), "the number of query heads");
  const int64_t rows = q.size(q.dim() - 3);
  queries.max_len = to_rows(rows, "q");
  queries.total_rows = x.packed ? rows : x.batch * rows;
  queries.rows = x.packed && !a.q_end
                     ? to_spans(*a.q_begin, q, x.batch, queries.max_len)
                     : to_spans(a.q_begin, a.q_end, q, x.batch, 1, queries.max_len, false, "q_begin", "q_end");
  return queries;
}

inline KeyValues to_key_values(const AttendArgs& a, const Layout& x) {
  const Tensor &q = a.q, &k = a.k;
  KeyValues kv;
  kv.k = view_of(k);
  kv.v = view_of(a.v);
  int64_t heads = k.size(k.dim() - 2), rows = k.size(k.dim() - 3);
  if (x.paged) {
    const Tensor& t = *a.page_table;
    check_index_tensor(t, q, "page_table");
    FLUX_CHECK((t.dim() == 2 || t.dim() == 3) && t.size(0) == x.batch, "page_table must be [", x.batch,
               ", max_pages] or [", x.batch, ", Hkv, max_pages], got ", shape_of(t));
    const int64_t max_pages = t.size(t.dim() - 1);
    FLUX_CHECK(max_pages <= 1 || t.stride(t.dim() - 1) == 1,
               "page_table must have a contiguous last dimension, got stride ", t.stride(t.dim() - 1));
    if (t.dim() == 3) {
      FLUX_CHECK(heads == 1, "a page_table per head [B, Hkv, max_pages] goes with pages of one head, got ", heads);
      heads = t.size(1);
    }
    FLUX_CHECK(a.kv_end, "page_table needs kv_len");
    kv.page_table = t.const_data_ptr<int32_t>();
    kv.page_stride_b = t.stride(0);
    kv.page_stride_h = t.dim() == 3 ? t.stride(1) : 0;
    kv.pages_per_head = t.dim() == 3;
    kv.page_size = to_int32(k.size(1), "page_size");
    FLUX_CHECK(kv.page_size >= 1, "page_size must be >= 1, got ", kv.page_size);
    kv.num_pages = to_int32(k.size(0), "num_pages");
    rows = max_pages * k.size(1);
  }
  const int64_t q_heads = q.size(q.dim() - 2);
  FLUX_CHECK(heads >= 1, "k must have at least one head, got ", heads);
  FLUX_CHECK(q_heads >= 1 && q_heads % heads == 0, "the query heads (", q_heads,
             ") must be a multiple of the key heads (", heads,
             "), one each at least: tensors are [B, S, H, D], tokens before heads");
  kv.num_heads = to_int32(heads, "the number of key heads");
  const int32_t capacity = to_rows(rows, x.paged ? "the pages of page_table" : "k");
  kv.rows = x.packed_kv && !a.kv_end
                ? to_spans(*a.kv_begin, q, x.batch, capacity)
                : to_spans(a.kv_begin, a.kv_end, q, x.batch, heads, capacity, true, "kv_begin", "kv_len");
  return kv;
}

// `p` has all but the routing.
inline Routing to_route(const AttendArgs& a, const AttendParams& p) {
  Routing routing;
  if (a.route) {
    const Tensor& r = *a.route;
    check_index_tensor(r, a.q, "route");
    FLUX_CHECK(
        (r.dim() == 1 && r.size(0) == p.batch) || (r.dim() == 2 && r.size(0) == p.batch && r.size(1) == p.kv.num_heads),
        "route must be [", p.batch, "] or [", p.batch, ", ", p.kv.num_heads, "], got ", shape_of(r));
    routing.route = r.const_data_ptr<int32_t>();
    routing.stride_b = int32_t(r.stride(0));
    routing.stride_h = r.dim() == 2 ? int32_t(r.stride(1)) : 0;
  }
  return routing;
}

inline Routing to_routing(const AttendArgs& a, const AttendParams& p) {
  Routing routing = to_route(a, p);
  FLUX_CHECK(a.patterns.size() == 2 * kPatternNumbers, "patterns must hold ", 2 * kPatternNumbers, " integers, got ",
             a.patterns.size());
  const int64_t *full = a.patterns.data(), *sparse = full + kPatternNumbers;
  routing.patterns[0] = to_pattern(full, "full");
  routing.patterns[1] = to_pattern(sparse, "sparse");
  routing.blocks[0] = to_block_table(a.full_blocks, a.full_counts, full[kPatternNumbers - 1], a.q, p, "full");
  routing.blocks[1] = to_block_table(a.sparse_blocks, a.sparse_counts, sparse[kPatternNumbers - 1], a.q, p, "sparse");
  return routing;
}

// Fills all but out and lse. Nothing is checked that would need a look into device memory.
inline AttendParams to_attend_params(const AttendArgs& a) {
  const Layout x = to_layout(a);
  AttendParams p;
  p.batch = to_int32(x.batch, "batch");
  p.head_dim = int32_t(a.q.size(a.q.dim() - 1));
  p.dtype = to_dtype(a.q, "q");
  p.kv = to_key_values(a, x);
  to_int32(x.batch * p.kv.num_heads, "batch times key heads");
  p.q = to_queries(a, x);
  p.routing = to_routing(a, p);
  p.scale = float(a.scale);
  FLUX_CHECK(std::isfinite(p.scale), "scale must be a finite number in 32 bits, got ", a.scale);
  return p;
}

inline void set_outputs(AttendParams& p, const Tensor& out, const Tensor& lse) {
  p.out = mutable_view_of(out);
  p.lse = lse.mutable_data_ptr<float>();
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

inline AttendBackwardParams to_backward_params(const BackwardArgs& b, const Tensor& grad_out, const Tensor& grad_q,
                                               const Tensor& grad_k, const Tensor& grad_v) {
  const Tensor &q = b.forward.q, &out = b.out, &lse = b.lse;
  AttendBackwardParams p;
  p.forward = to_attend_params(b.forward);
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
  FLUX_CHECK(lse.is_cuda() == q.is_cuda() && lse.get_device_index() == q.get_device_index(),
             "lse must be on the device of q (", device_of(q), "), got ", device_of(lse));
  set_outputs(p.forward, out, lse);
  p.grad_out = view_of(grad_out);
  p.grad_q = mutable_view_of(grad_q);
  p.grad_k = mutable_view_of(grad_k);
  p.grad_v = mutable_view_of(grad_v);
  return p;
}

inline Tensor to_tensor(const Explanation& e) {
  constexpr int64_t kNumbers = sizeof(Explanation) / sizeof(int64_t);
  Tensor t = torch::stable::empty({kNumbers}, ScalarType::Long);
  std::memcpy(t.mutable_data_ptr(), &e, sizeof(e));
  return t;
}

}  // namespace flux::torch_ops
