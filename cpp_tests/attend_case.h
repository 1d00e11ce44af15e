// Random calls of the attention stages, and what is expected of them. Used by cpu_test and cuda_test.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "random_problem.h"
#include "reference.h"

namespace flux::test {

inline size_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// A tensor that is NaN until values are put in.
struct Data {
  DType dtype = DType::kFloat32;
  std::vector<unsigned char> bytes;

  void allocate(DType t, int64_t elements) {
    dtype = t;
    bytes.resize(size_t(elements) * size_of(t));
    for (int64_t i = 0; i < elements; ++i) write(t, bytes.data(), i, NAN);
  }
  int64_t size() const { return int64_t(bytes.size() / size_of(dtype)); }
  double operator[](int64_t i) const { return read(dtype, bytes.data(), i); }
  void set(int64_t i, double value) { write(dtype, bytes.data(), i, value); }
  void fill(double value) {
    for (int64_t i = 0; i < size(); ++i) set(i, value);
  }
};

// The cases of the gradients' tests: head dimension and sizes of each.
inline constexpr int32_t kGradientDims[] = {64, 128, 96, 256, 40, 8, 64, 128, 104, 64};
inline ProblemOptions gradient_options(int i) {
  ProblemOptions o;
  o.max_batch = i == 4 ? 60 : 2;  // more sequences than a warp has lanes
  o.max_kv_heads = 2;
  o.max_q_len = i == 4 ? 9 : 150;
  o.max_kv_len = i == 4 ? 40 : 250;
  if (i == 5) o.max_group = 80;                      // more heads than a block has rows
  if (i == 6) o.min_q_len = 100, o.max_kv_len = 20;  // queries that see no key
  return o;
}

struct AttendCase {
  Problem problem;
  AttendBackwardParams params;
  Data q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  std::vector<float> lse;
  std::vector<int32_t> page_table;
};

// [batch, rows, heads, dim] with gaps of so many `units`, or packed [rows, heads, dim]; returns its elements.
inline int64_t layout(Random& random, int32_t unit, bool packed, int64_t batch, int64_t rows, int64_t heads,
                      int64_t dim, Strides& s) {
  const auto gap = [&] { return random.integer(0, 1) * random.integer(1, 9) * unit; };
  s.h = dim + gap();
  s.s = s.h * heads + gap();
  s.b = packed ? 0 : s.s * rows + gap();
  return (packed ? 1 : batch) * (packed ? s.s * rows : s.b);
}

enum class Layout { kBatched, kPacked, kPaged, kPagedPerHead };

// Tensors for c.problem, which is there. `unit`: what strides are multiples of.
inline void random_tensors(Random& random, DType dtype, Layout kind, int32_t dim, int32_t unit, AttendCase& c) {
  AttendParams& p = c.params.forward;
  p = c.problem.params;
  p.head_dim = dim;
  p.dtype = dtype;
  p.scale = (random.chance(20) ? -1.5f : 1.f) / std::sqrt(float(dim));
  const bool paged = kind == Layout::kPaged || kind == Layout::kPagedPerHead, packed = kind == Layout::kPacked;

  c.q.allocate(dtype, layout(random, unit, packed, p.batch, p.q.rows.capacity, p.q.num_heads, dim, p.q.stride));
  c.out.allocate(dtype, layout(random, unit, packed, p.batch, p.q.rows.capacity, p.q.num_heads, dim, p.out.stride));
  c.grad_out.allocate(
      dtype, layout(random, unit, packed, p.batch, p.q.rows.capacity, p.q.num_heads, dim, c.params.grad_out.stride));
  c.grad_q.allocate(
      dtype, layout(random, unit, packed, p.batch, p.q.rows.capacity, p.q.num_heads, dim, c.params.grad_q.stride));
  p.lse_stride = {packed ? 0 : int64_t(p.q.num_heads) * p.q.rows.capacity, 1, p.q.rows.capacity};
  c.lse.assign(size_t(packed ? 1 : p.batch) * p.q.num_heads * p.q.rows.capacity, NAN);
  if (paged) {
    p.kv.page_size = 16 << random.integer(0, 2);
    const int32_t heads = kind == Layout::kPagedPerHead ? p.kv.num_heads : 1;
    const int32_t per_sequence = ceil_div(p.kv.rows.capacity, p.kv.page_size) + 1;
    p.kv.num_pages = p.batch * heads * per_sequence + 3;
    std::vector<int32_t> order(p.kv.num_pages);
    std::iota(order.begin(), order.end(), 0);
    for (int32_t i = p.kv.num_pages - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
    c.page_table.assign(size_t(p.batch) * heads * per_sequence, 1 << 30);  // garbage beyond the last key
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < heads; ++h)
        for (int32_t i = 0; i < ceil_div(p.kv.rows(b, h).end, p.kv.page_size); ++i) {
          const size_t n = (size_t(b) * heads + h) * per_sequence + i;
          c.page_table[n] = order[n];
        }
    p.kv.page_table = c.page_table.data();
    p.kv.page_stride_b = int64_t(heads) * per_sequence;
    p.kv.pages_per_head = kind == Layout::kPagedPerHead;
    p.kv.page_stride_h = p.kv.pages_per_head ? per_sequence : 0;
  }
  const int64_t kv_batch = paged ? p.kv.num_pages : p.batch, kv_rows = paged ? p.kv.page_size : p.kv.rows.capacity;
  const int64_t kv_heads = kind == Layout::kPagedPerHead ? 1 : p.kv.num_heads;
  c.k.allocate(dtype, layout(random, unit, packed, kv_batch, kv_rows, kv_heads, dim, p.kv.k.stride));
  c.v.allocate(dtype, layout(random, unit, packed, kv_batch, kv_rows, kv_heads, dim, p.kv.v.stride));
  c.grad_k.allocate(dtype, layout(random, unit, packed, kv_batch, kv_rows, kv_heads, dim, c.params.grad_k.stride));
  c.grad_v.allocate(dtype, layout(random, unit, packed, kv_batch, kv_rows, kv_heads, dim, c.params.grad_v.stride));

  // Values only where a sequence has rows; all else stays NaN.
  for (int32_t b = 0; b < p.batch; ++b) {
    for (int32_t g = 0; g < p.q.num_heads; ++g) {
      const Span rows = p.q.rows(b, g / p.group());
      for (int32_t r = rows.begin; r < rows.end; ++r)
        for (int32_t d = 0; d < dim; ++d) {
          c.q.set(at(p.q.stride, b, r, g) + d, random.normal());
          c.grad_out.set(at(c.params.grad_out.stride, b, r, g) + d, random.normal());
        }
    }
    for (int32_t h = 0; h < p.kv.num_heads; ++h)
      for (int32_t j = 0; j < p.kv.rows(b, h).size(); ++j)
        for (int32_t d = 0; d < dim; ++d) {
          c.k.set(kv_at(p, p.kv.k.stride, b, h, j) + d, random.normal());
          c.v.set(kv_at(p, p.kv.v.stride, b, h, j) + d, random.normal());
        }
  }
  c.grad_q.fill(0);  // as the operators hand them over
  c.grad_k.fill(0);
  c.grad_v.fill(0);
  p.q.data = c.q.bytes.data();
  p.kv.k.data = c.k.bytes.data();
  p.kv.v.data = c.v.bytes.data();
  p.out.data = c.out.bytes.data();
  p.lse = c.lse.data();
  c.params.grad_out.data = paged ? nullptr : c.grad_out.bytes.data();
  c.params.grad_q.data = c.grad_q.bytes.data();
  c.params.grad_k.data = c.grad_k.bytes.data();
  c.params.grad_v.data = c.grad_v.bytes.data();
}

inline void random_attend(Random& random, DType dtype, Layout kind, int32_t dim, int32_t unit, ProblemOptions o,
                          AttendCase& c) {
  o.packed = kind == Layout::kPacked;
  o.per_head_lengths = kind == Layout::kPagedPerHead || (kind == Layout::kBatched && random.chance(30));
  o.block_lists = random.chance(30);
  random_problem(random, o, c.problem);
  random_tensors(random, dtype, kind, dim, unit, c);
}

// Rounding of one number in this dtype.
inline double epsilon(DType t) { return t == DType::kFloat32 ? 0x1p-23 : t == DType::kFloat16 ? 0x1p-10 : 0x1p-7; }

// Relative error over rows [0, n) of `dim` elements that row(i) finds.
struct Difference {
  double error = 0, norm = 0;
  void add(double got, double want) {
    ASSERT_EQ(std::isfinite(got), std::isfinite(want)) << got << " instead of " << want;
    if (!std::isfinite(want)) return;
    error += (got - want) * (got - want);
    norm += want * want;
  }
  void expect_small(DType t, double factor, const char* name) const {
    EXPECT_LE(std::sqrt(error), factor * epsilon(t) * std::sqrt(norm) + 1e-6) << name;
  }
};

// Compares out and lse with `e`; rows of no sequence must be as they were, NaN. `slack`: how much more the rounding of
// the scores counts than at ordinary ones.
inline void expect_attended(const AttendCase& c, const Expected& e, double slack = 1) {
  const AttendParams& p = c.params.forward;
  const int32_t dim = p.head_dim;
  Difference out, lse;
  int64_t rows = 0;
  for_each_query(p, [&](int32_t seq, int32_t, int32_t g, int32_t row, const std::vector<int32_t>& keys) {
    ++rows;
    const int64_t i = at(p.lse_stride, seq, row, g), o = at(p.out.stride, seq, row, g);
    ASSERT_EQ(c.lse[i] == -INFINITY, keys.empty());
    lse.add(c.lse[i], e.lse[i]);
    for (int32_t d = 0; d < dim; ++d) out.add(c.out[o + d], e.out[o + d]);
  });
  out.expect_small(p.dtype, (p.dtype == DType::kFloat32 ? 16 : 1) * slack, "out");
  lse.expect_small(DType::kFloat32, 16 * slack, "lse");
  int64_t written = 0;
  for (int64_t i = 0; i < c.out.size(); ++i) written += !std::isnan(c.out[i]);
  EXPECT_EQ(written, rows * dim) << "rows of no sequence must stay untouched";
}

// Compares the gradients with `e`.
inline void expect_gradients(const AttendCase& c, const Expected& e, double slack = 1) {
  const AttendBackwardParams& b = c.params;
  const AttendParams& p = b.forward;
  Difference grad_q, grad_k, grad_v;
  for_each_query(p, [&](int32_t seq, int32_t, int32_t g, int32_t row, const std::vector<int32_t>&) {
    const int64_t i = at(b.grad_q.stride, seq, row, g);
    for (int32_t d = 0; d < p.head_dim; ++d) grad_q.add(c.grad_q[i + d], e.grad_q[i + d]);
  });
  for (int32_t seq = 0; seq < p.batch; ++seq)
    for (int32_t h = 0; h < p.kv.num_heads; ++h)
      for (int32_t j = 0; j < p.kv.rows(seq, h).size(); ++j)
        for (int32_t d = 0; d < p.head_dim; ++d) {
          const int64_t k = kv_at(p, b.grad_k.stride, seq, h, j) + d, v = kv_at(p, b.grad_v.stride, seq, h, j) + d;
          grad_k.add(c.grad_k[k], e.grad_k[k]);
          grad_v.add(c.grad_v[v], e.grad_v[v]);
        }
  grad_q.expect_small(p.dtype, 8 * slack, "grad_q");  // delta comes from the rounded output
  grad_k.expect_small(p.dtype, 8 * slack, "grad_k");
  grad_v.expect_small(p.dtype, 8 * slack, "grad_v");
}

inline Expected expected(const AttendCase& c) {
  // Gradients are laid out with strides of their own: the reference's vectors must hold the larger of them.
  return attend(c.params, std::max({c.q.size(), c.out.size(), c.grad_q.size()}), c.lse.size(),
                std::max({c.k.size(), c.v.size(), c.grad_k.size(), c.grad_v.size()}));
}

struct RouteCase {
  RouteParams params;
  std::vector<int32_t> begin, end, route;
  Data x, weights[kRouterLayers], biases[kRouterLayers];
  std::vector<float> pooled, logits;
};

// Tensors for the sizes in c.params.
inline void fill_route(Random& random, int32_t max_len, int32_t unit, const int32_t (&widths)[kRouterLayers],
                       RouteCase& c) {
  RouteParams& p = c.params;
  const int32_t capacity = max_len + 20;
  for (int32_t b = 0; b < p.batch; ++b) {
    c.begin.push_back(random.integer(0, 10));
    c.end.push_back(c.begin.back() + (random.chance(10) ? 0 : random.integer(1, max_len)));
  }
  p.rows.begin = c.begin.data();
  p.rows.end = c.end.data();
  p.rows.capacity = capacity;
  c.x.allocate(p.dtype, layout(random, unit, false, p.batch, capacity, p.num_heads, p.head_dim, p.x_stride));
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t r = c.begin[b]; r < c.end[b]; ++r)
      for (int32_t h = 0; h < p.num_heads; ++h)
        for (int32_t d = 0; d < p.head_dim; ++d) c.x.set(at(p.x_stride, b, r, h) + d, random.normal());
  p.x = c.x.bytes.data();
  int32_t in = p.head_dim;
  for (int l = 0; l < kRouterLayers; ++l) {
    const int32_t out = widths[l];
    c.weights[l].allocate(p.weight_dtype, int64_t(in) * out);
    c.biases[l].allocate(p.weight_dtype, out);
    for (int64_t n = 0; n < c.weights[l].size(); ++n) c.weights[l].set(n, random.normal() * 2.f / std::sqrt(float(in)));
    for (int64_t n = 0; n < out; ++n) c.biases[l].set(n, random.normal());
    p.layers[l] = {c.weights[l].bytes.data(), c.biases[l].bytes.data(), in, out};
    in = out;
  }
  const int32_t decisions = p.batch * (p.per_head ? p.num_heads : 1);
  c.pooled.assign(size_t(decisions) * p.head_dim, NAN);
  c.logits.assign(2 * size_t(decisions), NAN);
  c.route.assign(decisions, -1);
  p.pooled = c.pooled.data();
  p.logits = c.logits.data();
  p.route = c.route.data();
}

// Small and odd.
inline void random_route(Random& random, int32_t max_batch, int32_t max_heads, int32_t max_width, RouteCase& c) {
  RouteParams& p = c.params;
  p.dtype = DType(random.integer(0, 2));
  p.weight_dtype = DType(random.integer(0, 2));
  p.batch = random.integer(1, max_batch);
  p.num_heads = random.integer(1, max_heads);
  p.head_dim = 8 * random.integer(1, 16);
  p.pool_size = random.integer(1, 30);
  p.per_head = random.chance(50);
  const int32_t unit = random.chance(50) ? 8 : 1;
  int32_t widths[kRouterLayers] = {0, 0, 0, 0, 2};
  for (int l = 0; l < kRouterLayers - 1; ++l) widths[l] = ceil_div(random.integer(3, max_width), unit) * unit;
  fill_route(random, 60, unit, widths, c);
}

inline void expect_routed(const RouteCase& c, double tolerance) {
  const std::vector<double> want = route_logits(c.params);
  for (size_t n = 0; n < want.size(); ++n) EXPECT_NEAR(c.logits[n], want[n], tolerance);
  for (size_t n = 0; n < c.route.size(); ++n) EXPECT_EQ(c.route[n], c.logits[2 * n] >= c.logits[2 * n + 1]);
}

}  // namespace flux::test
