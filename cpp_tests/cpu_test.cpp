// The CPU stages against double precision, for every dtype and layout, with padding full of NaN.
#include "cpu/cpu.h"

#include <gtest/gtest.h>

#include <cstring>
#include <iterator>
#include <thread>

#include "attend_case.h"
#include "select_case.h"

namespace flux {
namespace {

using test::AttendCase;
using test::Data;
using test::Difference;
using test::Layout;
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

void check_attend(AttendCase& c, const Workers& workers, double slack = 1) {
  const AttendBackwardParams& b = c.params;
  cpu::attend(b.forward, workers);
  const test::Expected e = test::expected(c);
  test::expect_attended(c, e, slack);
  if (!b.grad_out.data) return;

  cpu::attend_backward(b, workers);
  test::expect_gradients(c, e, slack);
}

class Attend : public testing::TestWithParam<std::tuple<DType, Layout>> {};

TEST_P(Attend, AgreesWithDoublePrecision) {
  const auto [dtype, kind] = GetParam();
  Random random(31 + 10 * int(dtype) + int(kind));
  const int32_t dims[] = {8, 24, 64, 72, 128, 256};
  test::ProblemOptions options;
  options.max_batch = 3;
  options.max_q_len = 140;
  options.max_kv_len = 200;
  for (int i = 0; i < 12; ++i) {
    AttendCase c;
    random_attend(random, dtype, kind, dims[i % 6], 1, options, c);
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
  AttendBackwardParams& b = c.params;
  AttendParams& p = b.forward;
  p.batch = p.kv.num_heads = 1;
  p.q.num_heads = group;
  p.head_dim = dim;
  p.q.max_len = p.q.rows.capacity = p.kv.rows.capacity = len;
  p.q.total_rows = len;
  p.routing.patterns[0] = pattern;
  p.dtype = dtype;
  p.scale = 0.125f;
  p.q.stride = p.out.stride = b.grad_out.stride = b.grad_q.stride = {0, int64_t(group) * dim, dim};
  p.kv.k.stride = p.kv.v.stride = b.grad_k.stride = b.grad_v.stride = {0, dim, dim};
  p.lse_stride = {0, 1, len};
  for (Data* t : {&c.q, &c.out, &c.grad_out, &c.grad_q}) t->allocate(dtype, int64_t(len) * group * dim);
  for (Data* t : {&c.k, &c.v, &c.grad_k, &c.grad_v}) t->allocate(dtype, int64_t(len) * dim);
  for (Data* t : {&c.q, &c.k, &c.v, &c.grad_out})
    for (int64_t i = 0; i < t->size(); ++i) t->set(i, random.normal());
  c.lse.assign(size_t(len) * group, NAN);
  p.q.data = c.q.bytes.data();
  p.kv.k.data = c.k.bytes.data();
  p.kv.v.data = c.v.bytes.data();
  p.out.data = c.out.bytes.data();
  p.lse = c.lse.data();
  b.grad_out.data = c.grad_out.bytes.data();
  b.grad_q.data = c.grad_q.bytes.data();
  b.grad_k.data = c.grad_k.bytes.data();
  b.grad_v.data = c.grad_v.bytes.data();
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

class Select : public testing::TestWithParam<std::tuple<DType, Layout>> {};

TEST_P(Select, KeepsTheFewestBlocks) {
  const auto [dtype, kind] = GetParam();
  Random random(201 + 10 * int(dtype) + int(kind));
  const int32_t dims[] = {8, 24, 64, 72, 128, 64};
  test::ProblemOptions options;
  options.max_batch = 2;
  options.max_q_len = 280;
  options.max_kv_len = 700;
  for (int i = 0; i < 6; ++i) {
    test::SelectCase c;
    test::random_select(random, dtype, kind, dims[i], 1, options, c);
    SCOPED_TRACE("case " + std::to_string(i) + ", " + cpu::isa());
    cpu::select(c.params, Workers(random.integer(1, 5), i % 2 == 1));
    test::expect_selected(c);
    if (HasFatalFailure()) return;
  }
}
INSTANTIATE_TEST_SUITE_P(Cpu, Select,
                         testing::Combine(testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16),
                                          testing::Values(Layout::kBatched, Layout::kPacked, Layout::kPaged,
                                                          Layout::kPagedPerHead)),
                         name_of);

TEST(Cpu, ExplainsWithTheNameOfItsInstructionSet) {
  Random random(71);
  AttendCase c;
  random_attend(random, DType::kBFloat16, Layout::kBatched, 64, 1, {}, c);
  c.params.forward.q.max_len = 9;
  const Explanation e = cpu::explain(c.params.forward, Workers(2, false));
  ASSERT_LT(e.processor, int64_t(std::size(cpu::kIsaNames)));
  EXPECT_STREQ(cpu::kIsaNames[e.processor], cpu::isa());
}

#ifdef FLUX_EMULATE_AMX
TEST(Cpu, RunsOnTheEmulatedUnit) {
  if (std::strcmp(cpu::isa(), "amx_bf16"))
    GTEST_SKIP() << "this processor has no AVX-512 with bf16, which the kernels need besides: tested " << cpu::isa();
}
#endif

TEST(Cpu, Route) {
  Random random(61);
  for (int i = 0; i < 40; ++i) {
    test::RouteCase c;
    test::random_route(random, 3, 4, 70, c);
    SCOPED_TRACE("case " + std::to_string(i));
    cpu::route(c.params, Workers(3, false));
    test::expect_routed(c, 2e-5);
  }
}

}  // namespace
}  // namespace flux
