// Mixtures of two patterns: the sets of keys against the specification, the CPU stages against hard routes.
#include "core/mixture.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "attend_case.h"
#include "cpu/cpu.h"
#include "random_problem.h"

namespace flux {
namespace {

using test::AttendCase;
using test::Data;
using test::Layout;
using test::Random;

std::set<int32_t> blocks_of(const KvBlocks& b) {
  std::set<int32_t> found;
  for (int32_t i = 0; i < b.size(); ++i) found.insert(b[i]);
  return found;
}

Coverage coverage_of(int64_t seen, int64_t all) {
  return seen == 0 ? Coverage::kNone : seen == all ? Coverage::kAll : Coverage::kSome;
}

void check_tile(const Branches& v, int32_t width) {
  std::vector<int32_t> visited;
  for (BothBlocks both(v); both.more(); both.next()) {
    visited.push_back(both.block);
    ASSERT_EQ(both.in_full, contains(v.full.blocks, both.block));
    ASSERT_EQ(both.in_sparse, contains(v.sparse.blocks, both.block));
    int64_t full = 0, sparse = 0, pairs = 0, in_set[kKeySets] = {};
    for (int32_t token = 0; token < v.full.q_rows.size(); ++token)
      for (int32_t key = both.block * width; key < (both.block + 1) * width; ++key, ++pairs) {
        const bool exists = key < v.full.kv_rows.size() && v.full.q_pos + token >= 0;
        const bool f = exists && v.full.sees(token, key), s = exists && v.sparse.sees(token, key);
        full += f;
        sparse += s;
        in_set[kSeenByBoth] += f && s;
        in_set[kSeenByFullOnly] += f && !s;
        in_set[kSeenBySparseOnly] += s && !f;
      }
    for (int set = 0; set < kKeySets; ++set) {
      const Coverage said = coverage(KeySet(set), coverage_of(full, pairs), coverage_of(sparse, pairs));
      const Coverage is = coverage_of(in_set[set], pairs);
      ASSERT_TRUE(said == is || said == Coverage::kSome) << "set " << set << " of block " << both.block;
    }
  }
  std::set<int32_t> either = blocks_of(v.full.blocks);
  either.merge(blocks_of(v.sparse.blocks));
  EXPECT_EQ(visited, std::vector<int32_t>(either.begin(), either.end()));
}

TEST(Mixture, EveryKeyThatIsSeenBelongsToOneSet) {
  Random random(301);
  test::ProblemOptions options;
  options.max_q_len = 200;
  for (int i = 0; i < 60; ++i) {
    options.block_lists = i % 2 == 0;
    test::Problem problem;
    random_problem(random, options, problem);
    const AttendParams& p = problem.params;
    const TileShape shape{1 << random.integer(3, 6), 64};
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < p.kv.num_heads; ++h)
        for (int32_t m = 0; m < tiles_in_seq_head(p, shape, b, h); ++m) {
          check_tile(view_branches(p, shape, {b, h, m}), shape.kv_block);
          if (HasFatalFailure()) return;
        }
  }
}

TEST(Mixture, GradientsOfKeysThatBothSeeAreThoseOfTheTwo) {
  Random random(302);
  for (int i = 0; i < 200; ++i) {
    const float w = i % 10 == 0 ? float(i % 20 == 0) : float(random.integer(0, 100)) / 100.f;
    const float full_lse = 40.f * random.normal(), sparse_lse = 40.f * random.normal();
    const float full_delta = random.normal(), sparse_delta = random.normal(), dp = random.normal();
    const float score = std::min(full_lse, sparse_lse) - float(random.integer(0, 3));
    const SetGradient g = seen_by_both(1 - w, full_lse, full_delta, w, sparse_lse, sparse_delta);
    const double full = (1. - w) * std::exp2(double(score) - full_lse),
                 sparse = w * std::exp2(double(score) - sparse_lse);
    const double p = g.share * std::exp2(double(score) - g.lse);
    EXPECT_NEAR(p, full + sparse, 1e-5 * (full + sparse) + 1e-37);
    EXPECT_NEAR(p * (dp - g.delta), full * (dp - full_delta) + sparse * (dp - sparse_delta),
                1e-5 * (full + sparse) + 1e-37);
  }
  EXPECT_EQ(seen_by_both(0.5f, -INFINITY, 0.f, 0.5f, 1.f, 0.f).share, 0.f);
  EXPECT_EQ(seen_by_one(1.f, -INFINITY, 0.f).lse, INFINITY);
}

class InTurn : public cpu::Executor {
 public:
  int num_workers() const override { return 3; }
  void run(int64_t n, const std::function<void(int64_t)>& body) const override {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
};

// Relative difference of a tensor from (1 - w) a + w b, over what is finite there.
double difference(const Data& got, const Data& a, const Data& b, double w) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double want = (1 - w) * a[i] + w * b[i];
    if (!std::isfinite(want)) continue;
    error += (got[i] - want) * (got[i] - want);
    norm += want * want;
  }
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

class Mix : public testing::TestWithParam<DType> {};

TEST_P(Mix, IsTheSumOfItsBranches) {
  const DType dtype = GetParam();
  const double tolerance = 8 * test::epsilon(dtype) + 1e-5;
  Random random(303 + int(dtype));
  const int32_t dims[] = {8, 24, 64, 72, 128, 256};
  test::ProblemOptions options;
  options.max_batch = 2;
  options.max_q_len = 140;
  options.max_kv_len = 250;
  for (int i = 0; i < 12; ++i) {
    SCOPED_TRACE("case " + std::to_string(i) + ", " + cpu::isa());
    AttendCase c;
    random_attend(random, dtype, i % 2 ? Layout::kPacked : Layout::kBatched, dims[i % 6], 1, options, c);
    AttendBackwardParams& b = c.params;
    AttendParams& p = b.forward;
    std::vector<int32_t> route(p.batch);
    p.routing.route = route.data();
    p.routing.stride_b = 1;
    p.routing.stride_h = 0;
    Data out[2], grad_q[2], grad_k[2], grad_v[2];
    for (int mode = 0; mode < 2; ++mode) {
      std::fill(route.begin(), route.end(), mode);
      cpu::attend(p, InTurn());
      cpu::attend_backward(b, InTurn());
      out[mode] = c.out, grad_q[mode] = c.grad_q, grad_k[mode] = c.grad_k, grad_v[mode] = c.grad_v;
    }
    const float w = i < 2 ? float(i) : float(random.integer(1, 99)) / 100.f;
    const std::vector<float> weight(p.batch, w);
    std::vector<float> grad_weight(p.batch, 0.f), sparse_lse(c.lse.size(), NAN);
    Data sparse = c.out, mixed = c.out;
    Mixture m;
    m.weight = weight.data();
    m.stride_b = m.grad_stride_b = 1;
    m.grad_weight = grad_weight.data();
    m.sparse_out = {sparse.bytes.data(), p.out.stride};
    m.mixed = {mixed.bytes.data(), p.out.stride};
    m.sparse_lse = sparse_lse.data();
    cpu::mix(p, m, InTurn());
    EXPECT_LE(difference(c.out, out[0], out[0], 0), tolerance);
    EXPECT_LE(difference(sparse, out[1], out[1], 0), tolerance);
    EXPECT_LE(difference(mixed, out[0], out[1], w), tolerance);
    cpu::mix_backward(b, m, InTurn());
    EXPECT_LE(difference(c.grad_q, grad_q[0], grad_q[1], w), tolerance);
    EXPECT_LE(difference(c.grad_k, grad_k[0], grad_k[1], w), tolerance);
    EXPECT_LE(difference(c.grad_v, grad_v[0], grad_v[1], w), tolerance);
    for (int32_t seq = 0; seq < p.batch; ++seq) {
      double want = 0, size = 0;
      for (int32_t h = 0; h < p.q.num_heads; ++h)
        for (int32_t row = p.q.rows(seq, 0).begin; row < p.q.rows(seq, 0).end; ++row)
          for (int32_t d = 0; d < p.head_dim; ++d) {
            const double go = c.grad_out[test::at(b.grad_out.stride, seq, row, h) + d];
            const int64_t at = test::at(p.out.stride, seq, row, h) + d;
            want += go * (sparse[at] - c.out[at]);
            size += std::abs(go * (sparse[at] - c.out[at]));
          }
      EXPECT_NEAR(grad_weight[seq], want, 1e-5 * size);
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Cpu, Mix, testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16));

}  // namespace
}  // namespace flux
