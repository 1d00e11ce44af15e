// The CPU stages against double precision, for every dtype and layout, with padding full of NaN.
#include "cpu/cpu.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <thread>

#include "random_problem.h"
#include "reference.h"

namespace flux {
namespace {

using test::Random;

// Workers one after the other, or each on a thread of its own.
class Workers : public cpu::Executor {
 public:
  Workers(int count, bool threads) : count_(count), threads_(threads) {}
  int num_workers() const override { return count_; }
  void run(int64_t n, const std::function<void(int64_t)>& body) const override {
    std::vector<std::thread> running;
    for (int64_t i = 0; i < n; ++i) {
      if (threads_)
        running.emplace_back(body, i);
      else
        body(i);
    }
    for (std::thread& t : running) t.join();
  }

 private:
  int count_;
  bool threads_;
};

size_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

// A tensor that is NaN until values are put in.
struct Data {
  DType dtype = DType::kFloat32;
  std::vector<unsigned char> bytes;

  void allocate(DType t, int64_t elements) {
    dtype = t;
    bytes.resize(size_t(elements) * size_of(t));
    for (int64_t i = 0; i < elements; ++i) test::write(t, bytes.data(), i, NAN);
  }
  int64_t size() const { return int64_t(bytes.size() / size_of(dtype)); }
  double operator[](int64_t i) const { return test::read(dtype, bytes.data(), i); }
  void set(int64_t i, double value) { test::write(dtype, bytes.data(), i, value); }
  void fill(double value) {
    for (int64_t i = 0; i < size(); ++i) set(i, value);
  }
};

struct AttendCase {
  test::Problem problem;
  AttendBackwardParams params;
  Data q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  std::vector<float> lse;
  std::vector<int32_t> page_table;
};

// [batch, rows, heads, dim] with odd gaps, or packed [rows, heads, dim]; returns its elements.
int64_t layout(Random& random, bool packed, int64_t batch, int64_t rows, int64_t heads, int64_t dim, Strides& s) {
  s.h = dim + random.integer(0, 1) * random.integer(1, 9);
  s.s = s.h * heads + random.integer(0, 1) * random.integer(1, 9);
  s.b = packed ? 0 : s.s * rows + random.integer(0, 1) * random.integer(1, 9);
  return (packed ? 1 : batch) * (packed ? s.s * rows : s.b);
}

enum class Layout { kBatched, kPacked, kPaged, kPagedPerHead };

void random_attend(Random& random, DType dtype, Layout kind, int32_t dim, AttendCase& c) {
  test::ProblemOptions o;
  o.max_batch = 3;
  o.max_q_len = 140;
  o.max_kv_len = 200;
  o.packed = kind == Layout::kPacked;
  o.per_head_lengths = kind == Layout::kPagedPerHead || (kind == Layout::kBatched && random.chance(30));
  o.block_lists = random.chance(30);
  test::random_problem(random, o, c.problem);
  AttendParams& p = c.params.forward;
  ProblemShape& s = c.problem.shape;
  s.head_dim = dim;
  p.shape = s;
  p.dtype = dtype;
  p.scale = (random.chance(20) ? -1.5f : 1.f) / std::sqrt(float(dim));
  const bool paged = kind == Layout::kPaged || kind == Layout::kPagedPerHead, packed = kind == Layout::kPacked;

  c.q.allocate(dtype, layout(random, packed, s.batch, s.q_rows.capacity, s.num_q_heads, dim, p.q_stride));
  c.out.allocate(dtype, layout(random, packed, s.batch, s.q_rows.capacity, s.num_q_heads, dim, p.out_stride));
  c.grad_out.allocate(dtype,
                      layout(random, packed, s.batch, s.q_rows.capacity, s.num_q_heads, dim, c.params.grad_out_stride));
  c.grad_q.allocate(dtype,
                    layout(random, packed, s.batch, s.q_rows.capacity, s.num_q_heads, dim, c.params.grad_q_stride));
  p.lse_stride = {packed ? 0 : int64_t(s.num_q_heads) * s.q_rows.capacity, 1, s.q_rows.capacity};
  c.lse.assign(size_t(packed ? 1 : s.batch) * s.num_q_heads * s.q_rows.capacity, NAN);
  if (paged) {
    p.page_size = 16 << random.integer(0, 2);
    const int32_t heads = kind == Layout::kPagedPerHead ? s.num_kv_heads : 1;
    const int32_t per_sequence = ceil_div(s.kv_rows.capacity, p.page_size) + 1;
    p.num_pages = s.batch * heads * per_sequence + 3;
    std::vector<int32_t> order(p.num_pages);
    std::iota(order.begin(), order.end(), 0);
    for (int32_t i = p.num_pages - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
    c.page_table.assign(size_t(s.batch) * heads * per_sequence, 1 << 30);  // garbage beyond the last key
    for (int32_t b = 0; b < s.batch; ++b)
      for (int32_t h = 0; h < heads; ++h)
        for (int32_t i = 0; i < ceil_div(s.kv_rows(b, h).end, p.page_size); ++i) {
          const size_t n = (size_t(b) * heads + h) * per_sequence + i;
          c.page_table[n] = order[n];
        }
    p.page_table = c.page_table.data();
    p.page_stride_b = int64_t(heads) * per_sequence;
    p.pages_per_head = kind == Layout::kPagedPerHead;
    p.page_stride_h = p.pages_per_head ? per_sequence : 0;
  }
  const int64_t kv_batch = paged ? p.num_pages : s.batch, kv_rows = paged ? p.page_size : s.kv_rows.capacity;
  const int64_t kv_heads = kind == Layout::kPagedPerHead ? 1 : s.num_kv_heads;
  c.k.allocate(dtype, layout(random, packed, kv_batch, kv_rows, kv_heads, dim, p.k_stride));
  c.v.allocate(dtype, layout(random, packed, kv_batch, kv_rows, kv_heads, dim, p.v_stride));
  c.grad_k.allocate(dtype, layout(random, packed, kv_batch, kv_rows, kv_heads, dim, c.params.grad_k_stride));
  c.grad_v.allocate(dtype, layout(random, packed, kv_batch, kv_rows, kv_heads, dim, c.params.grad_v_stride));

  // Values only where a sequence has rows; all else stays NaN.
  for (int32_t b = 0; b < s.batch; ++b) {
    for (int32_t g = 0; g < s.num_q_heads; ++g) {
      const Span rows = s.q_rows(b, g / s.group());
      for (int32_t r = rows.begin; r < rows.end; ++r)
        for (int32_t d = 0; d < dim; ++d) {
          c.q.set(test::at(p.q_stride, b, r, g) + d, random.normal());
          c.grad_out.set(test::at(c.params.grad_out_stride, b, r, g) + d, random.normal());
        }
    }
    for (int32_t h = 0; h < s.num_kv_heads; ++h)
      for (int32_t j = 0; j < s.kv_rows(b, h).size(); ++j)
        for (int32_t d = 0; d < dim; ++d) {
          c.k.set(test::kv_at(p, p.k_stride, b, h, j) + d, random.normal());
          c.v.set(test::kv_at(p, p.v_stride, b, h, j) + d, random.normal());
        }
  }
  c.grad_q.fill(0);  // as the operators hand them over
  c.grad_k.fill(0);
  c.grad_v.fill(0);
  p.q = c.q.bytes.data();
  p.k = c.k.bytes.data();
  p.v = c.v.bytes.data();
  p.out = c.out.bytes.data();
  p.lse = c.lse.data();
  c.params.grad_out = paged ? nullptr : c.grad_out.bytes.data();
  c.params.grad_q = c.grad_q.bytes.data();
  c.params.grad_k = c.grad_k.bytes.data();
  c.params.grad_v = c.grad_v.bytes.data();
}

// Rounding of one number in this dtype.
double epsilon(DType t) { return t == DType::kFloat32 ? 0x1p-23 : t == DType::kFloat16 ? 0x1p-10 : 0x1p-7; }

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

// `slack`: how much more the rounding of the scores counts than at ordinary ones.
void check_attend(AttendCase& c, const Workers& workers, double slack = 1) {
  const AttendBackwardParams& b = c.params;
  const AttendParams& p = b.forward;
  const int32_t dim = p.shape.head_dim;
  cpu::attend(p, workers);
  // Gradients are laid out with strides of their own: the reference's vectors must hold the larger of them.
  const test::Expected e = test::attend(b, std::max({c.q.size(), c.out.size(), c.grad_q.size()}), c.lse.size(),
                                        std::max({c.k.size(), c.v.size(), c.grad_k.size(), c.grad_v.size()}));
  Difference out, lse, grad_q, grad_k, grad_v;
  int64_t rows = 0;
  test::for_each_query(p.shape, [&](int32_t seq, int32_t, int32_t g, int32_t row, const std::vector<int32_t>& keys) {
    ++rows;
    const int64_t i = test::at(p.lse_stride, seq, row, g), o = test::at(p.out_stride, seq, row, g);
    ASSERT_EQ(c.lse[i] == -INFINITY, keys.empty());
    lse.add(c.lse[i], e.lse[i]);
    for (int32_t d = 0; d < dim; ++d) out.add(c.out[o + d], e.out[o + d]);
  });
  out.expect_small(p.dtype, (p.dtype == DType::kFloat32 ? 16 : 1) * slack, "out");
  lse.expect_small(DType::kFloat32, 16 * slack, "lse");
  int64_t written = 0;
  for (int64_t i = 0; i < c.out.size(); ++i) written += !std::isnan(c.out[i]);
  EXPECT_EQ(written, rows * dim) << "rows of no sequence must stay untouched";
  if (!b.grad_out) return;

  cpu::attend_backward(b, workers);
  test::for_each_query(p.shape, [&](int32_t seq, int32_t, int32_t g, int32_t row, const std::vector<int32_t>&) {
    const int64_t i = test::at(b.grad_q_stride, seq, row, g);
    for (int32_t d = 0; d < dim; ++d) grad_q.add(c.grad_q[i + d], e.grad_q[i + d]);
  });
  for (int32_t seq = 0; seq < p.shape.batch; ++seq)
    for (int32_t h = 0; h < p.shape.num_kv_heads; ++h)
      for (int32_t j = 0; j < p.shape.kv_rows(seq, h).size(); ++j)
        for (int32_t d = 0; d < dim; ++d) {
          const int64_t k = test::kv_at(p, b.grad_k_stride, seq, h, j) + d;
          const int64_t v = test::kv_at(p, b.grad_v_stride, seq, h, j) + d;
          grad_k.add(c.grad_k[k], e.grad_k[k]);
          grad_v.add(c.grad_v[v], e.grad_v[v]);
        }
  grad_q.expect_small(p.dtype, 8 * slack, "grad_q");  // delta comes from the rounded output
  grad_k.expect_small(p.dtype, 8 * slack, "grad_k");
  grad_v.expect_small(p.dtype, 8 * slack, "grad_v");
}

class Attend : public testing::TestWithParam<std::tuple<DType, Layout>> {};

TEST_P(Attend, AgreesWithDoublePrecision) {
  const auto [dtype, kind] = GetParam();
  Random random(31 + 10 * int(dtype) + int(kind));
  const int32_t dims[] = {8, 24, 64, 72, 128, 256};
  for (int i = 0; i < 12; ++i) {
    AttendCase c;
    random_attend(random, dtype, kind, dims[i % 6], c);
    const int workers = i % 3 == 0 ? 1 : random.integer(2, 40);
    SCOPED_TRACE("case " + std::to_string(i) + ", " + std::to_string(workers) + " workers, " + cpu::isa());
    check_attend(c, Workers(workers, i % 4 == 1));
    if (HasFatalFailure()) return;
  }
}

std::string name_of(const testing::TestParamInfo<std::tuple<DType, Layout>>& info) {
  const char* dtypes[] = {"Float32", "Float16", "BFloat16"};
  const char* layouts[] = {"Batched", "Packed", "Paged", "PagedPerHead"};
  return std::string(dtypes[int(std::get<0>(info.param))]) + layouts[int(std::get<1>(info.param))];
}
INSTANTIATE_TEST_SUITE_P(Cpu, Attend,
                         testing::Combine(testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16),
                                          testing::Values(Layout::kBatched, Layout::kPacked, Layout::kPaged,
                                                          Layout::kPagedPerHead)),
                         name_of);

// One long sequence, one KV head: what there is for many workers is to cut tiles, and key blocks.
void random_long(Random& random, DType dtype, int32_t dim, int32_t len, int32_t group, const Pattern& pattern,
                 AttendCase& c) {
  (void)random;
  test::Problem& problem = c.problem;
  problem.q_begin = problem.kv_begin = {0};
  problem.q_end = problem.kv_end = {len};
  ProblemShape s;
  s.batch = s.num_kv_heads = 1;
  s.num_q_heads = group;
  s.head_dim = dim;
  s.max_q_len = s.q_rows.capacity = s.kv_rows.capacity = len;
  s.total_q_rows = len;
  s.patterns[0] = pattern;
  AttendBackwardParams& b = c.params;
  AttendParams& p = b.forward;
  p.shape = problem.shape = s;
  p.dtype = dtype;
  p.scale = 0.125f;
  p.q_stride = p.out_stride = b.grad_out_stride = b.grad_q_stride = {0, int64_t(group) * dim, dim};
  p.k_stride = p.v_stride = b.grad_k_stride = b.grad_v_stride = {0, dim, dim};
  p.lse_stride = {0, 1, len};
  for (Data* t : {&c.q, &c.out, &c.grad_out, &c.grad_q}) t->allocate(dtype, int64_t(len) * group * dim);
  for (Data* t : {&c.k, &c.v, &c.grad_k, &c.grad_v}) t->allocate(dtype, int64_t(len) * dim);
  for (Data* t : {&c.q, &c.k, &c.v, &c.grad_out})
    for (int64_t i = 0; i < t->size(); ++i) t->set(i, random.normal());
  c.lse.assign(size_t(len) * group, NAN);
  p.q = c.q.bytes.data();
  p.k = c.k.bytes.data();
  p.v = c.v.bytes.data();
  p.out = c.out.bytes.data();
  p.lse = c.lse.data();
  b.grad_out = c.grad_out.bytes.data();
  b.grad_q = c.grad_q.bytes.data();
  b.grad_k = c.grad_k.bytes.data();
  b.grad_v = c.grad_v.bytes.data();
}

TEST(Cpu, GradientsHaveTheSameBitsForAnyNumberOfWorkers) {
  Random random(51);
  AttendCase c;
  random_long(random, DType::kBFloat16, 64, 700, 2, {16, 128, 40, 1}, c);
  cpu::attend(c.params.forward, Workers(1, false));
  cpu::attend_backward(c.params, Workers(1, false));
  const auto grad_q = c.grad_q.bytes, grad_k = c.grad_k.bytes, grad_v = c.grad_v.bytes;
  for (int workers : {2, 3, 16}) {
    cpu::attend_backward(c.params, Workers(workers, true));
    EXPECT_EQ(c.grad_q.bytes, grad_q);
    EXPECT_EQ(c.grad_k.bytes, grad_k);
    EXPECT_EQ(c.grad_v.bytes, grad_v);
  }
}

TEST(Cpu, TheSameCallGivesTheSameBits) {
  Random random(52);
  AttendCase c;
  random_long(random, DType::kFloat32, 64, 500, 4, {}, c);
  cpu::attend(c.params.forward, Workers(5, true));
  const auto out = c.out.bytes;
  cpu::attend(c.params.forward, Workers(5, true));
  EXPECT_EQ(c.out.bytes, out);
}

TEST(Cpu, LargeScoresAndInfinities) {
  Random random(53);
  for (int32_t group : {1, 4}) {
    for (int32_t len : {3, 90}) {  // few rows, many rows
      AttendCase c;
      random_long(random, DType::kFloat32, 16, len, group, {}, c);
      c.params.forward.scale = 300.f;  // probabilities are 0 or 1, or nearly
      check_attend(c, Workers(3, false), 1e4);
      // NaN in a query reaches its own row, and no other.
      c.q.set(16 * group + 5, NAN);
      cpu::attend(c.params.forward, Workers(3, false));
      for (int64_t i = 0; i < c.out.size(); ++i) ASSERT_EQ(std::isnan(c.out[i]), i / 16 == group) << "element " << i;
      // An infinite value is an infinite output where it has weight.
      c.q.set(16 * group + 5, 0.f);
      c.v.set(3, INFINITY);
      c.params.forward.scale = 0.f;
      cpu::attend(c.params.forward, Workers(3, false));
      for (int64_t i = 0; i < c.out.size(); ++i) ASSERT_EQ(std::isinf(c.out[i]), i % 16 == 3) << "element " << i;
    }
  }
}

TEST(Cpu, Route) {
  Random random(61);
  for (int i = 0; i < 40; ++i) {
    RouteParams p;
    p.dtype = DType(random.integer(0, 2));
    p.weight_dtype = DType(random.integer(0, 2));
    p.batch = random.integer(1, 3);
    p.num_heads = random.integer(1, 4);
    p.head_dim = 8 * random.integer(1, 16);
    p.pool_size = random.integer(1, 30);
    p.per_head = random.chance(50);
    const int32_t capacity = 80;
    std::vector<int32_t> begin, end;
    for (int32_t b = 0; b < p.batch; ++b) {
      begin.push_back(random.integer(0, 10));
      end.push_back(begin.back() + (random.chance(10) ? 0 : random.integer(1, 60)));
    }
    p.rows.begin = begin.data();
    p.rows.end = end.data();
    p.rows.capacity = capacity;
    Data x;
    x.allocate(p.dtype, layout(random, false, p.batch, capacity, p.num_heads, p.head_dim, p.x_stride));
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t r = begin[b]; r < end[b]; ++r)
        for (int32_t h = 0; h < p.num_heads; ++h)
          for (int32_t d = 0; d < p.head_dim; ++d) x.set(test::at(p.x_stride, b, r, h) + d, random.normal());
    p.x = x.bytes.data();
    Data weights[kRouterLayers], biases[kRouterLayers];
    int32_t in = p.head_dim;
    for (int l = 0; l < kRouterLayers; ++l) {
      const int32_t out = l == kRouterLayers - 1 ? 2 : random.integer(3, 70);
      weights[l].allocate(p.weight_dtype, int64_t(in) * out);
      biases[l].allocate(p.weight_dtype, out);
      for (int64_t n = 0; n < weights[l].size(); ++n) weights[l].set(n, random.normal() * 2.f / std::sqrt(float(in)));
      for (int64_t n = 0; n < out; ++n) biases[l].set(n, random.normal());
      p.layers[l] = {weights[l].bytes.data(), biases[l].bytes.data(), in, out};
      in = out;
    }
    const int32_t decisions = p.batch * (p.per_head ? p.num_heads : 1);
    std::vector<float> pooled(size_t(decisions) * p.head_dim, NAN), logits(2 * size_t(decisions), NAN);
    std::vector<int32_t> route(decisions, -1);
    p.pooled = pooled.data();
    p.logits = logits.data();
    p.route = route.data();
    cpu::route(p, Workers(3, false));
    const std::vector<double> want = test::route_logits(p);
    for (int32_t n = 0; n < 2 * decisions; ++n) EXPECT_NEAR(logits[n], want[n], 2e-5) << "case " << i;
    for (int32_t n = 0; n < decisions; ++n) EXPECT_EQ(route[n], logits[2 * n] >= logits[2 * n + 1]);
  }
}

}  // namespace
}  // namespace flux
