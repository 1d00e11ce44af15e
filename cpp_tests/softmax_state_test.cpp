#include "core/softmax_state.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "random_problem.h"

namespace flux {
namespace {

// A row with one output column: scores (base 2) and values.
struct Row {
  SoftmaxState state;
  float out = 0.f;

  void merge(const Row& other) {
    const MergeFactors f = state.merge(other.state);
    out = out * f.ours + other.out * f.theirs;
  }
  float result() const { return state.empty() ? 0.f : out / state.sum; }
};

Row one(float score, float value) { return {{score, 1.f}, value}; }

double exact(const std::vector<Row>& rows) {
  double max = -INFINITY, sum = 0, out = 0;
  for (const Row& r : rows) max = std::max(max, double(r.state.max));
  for (const Row& r : rows) sum += std::exp2(r.state.max - max), out += std::exp2(r.state.max - max) * r.out;
  return out / sum;
}

TEST(SoftmaxState, EmptySeesNothing) {
  const SoftmaxState s;
  EXPECT_TRUE(s.empty());
  EXPECT_EQ(s.lse(), -INFINITY);
}

TEST(SoftmaxState, EmptyIsNeutral) {
  Row a = one(3.f, 2.f);
  a.merge({});
  EXPECT_EQ(a.state.max, 3.f);
  EXPECT_EQ(a.state.sum, 1.f);
  EXPECT_EQ(a.out, 2.f);
  Row b;
  b.merge(one(3.f, 2.f));
  EXPECT_EQ(b.state.max, 3.f);
  EXPECT_EQ(b.state.sum, 1.f);
  EXPECT_EQ(b.out, 2.f);
  Row c;
  c.merge({});
  EXPECT_TRUE(c.state.empty());
  EXPECT_EQ(c.result(), 0.f);
}

TEST(SoftmaxState, AnyGroupingGivesTheSame) {
  test::Random random(21);
  for (int i = 0; i < 2000; ++i) {
    const int n = random.integer(1, 12);
    std::vector<Row> rows;
    for (int j = 0; j < n; ++j) rows.push_back(one(random.normal() * 20.f, random.normal()));
    std::vector<Row> pieces = rows;
    for (int j = random.integer(0, 3); j > 0; --j)
      pieces.insert(pieces.begin() + random.integer(0, int(pieces.size())), Row{});
    while (pieces.size() > 1) {  // merge neighbours in random order
      const int at = random.integer(0, int(pieces.size()) - 2);
      pieces[at].merge(pieces[at + 1]);
      pieces.erase(pieces.begin() + at + 1);
    }
    EXPECT_NEAR(pieces[0].result(), exact(rows), 2e-6);
    double sum = 0, max = -INFINITY;
    for (const Row& r : rows) max = std::max(max, double(r.state.max));
    for (const Row& r : rows) sum += std::exp2(r.state.max - max);
    EXPECT_NEAR(pieces[0].state.lse(), (max + std::log2(sum)) * std::log(2.0), 1e-4);
  }
}

TEST(SoftmaxState, ScoresFarApartDoNotOverflow) {
  Row a = one(3e38f, 1.f);
  a.merge(one(-3e38f, 5.f));
  EXPECT_EQ(a.result(), 1.f);
  Row b = one(-3e38f, 5.f);
  b.merge(one(3e38f, 1.f));
  EXPECT_EQ(b.result(), 1.f);
}

TEST(SoftmaxState, NaNStays) {
  Row a = one(1.f, 1.f);
  a.merge({{2.f, NAN}, NAN});
  EXPECT_TRUE(std::isnan(a.result()));
}

TEST(SoftmaxState, AllAtOnceIsOneAfterTheOther) {
  test::Random random(22);
  constexpr int kPieces = 5;
  for (int i = 0; i < 500; ++i) {
    SoftmaxState states[kPieces];
    float out[kPieces] = {}, factor[kPieces], sum = 0.f;
    Row one_by_one;
    for (int j = 0; j < kPieces; ++j) {
      if (random.integer(0, 3) > 0) {
        states[j] = {random.normal() * 20.f, 1.f + random.integer(0, 5)};
        out[j] = random.normal();
      }
      if (i % 10 == 0 && j == 2) states[j] = {5.f, NAN};
      if (i % 10 == 1 && j == 3) states[j].max = INFINITY, states[j].sum = 1.f;
      one_by_one.merge({states[j], out[j]});
    }
    const SoftmaxState all = merge(states, factor);
    for (int j = 0; j < kPieces; ++j) sum += out[j] * factor[j];
    EXPECT_EQ(all.empty(), one_by_one.state.empty());
    EXPECT_EQ(all.max, one_by_one.state.max);
    EXPECT_EQ(std::isnan(all.sum), std::isnan(one_by_one.state.sum));
    if (std::isnan(all.sum)) continue;
    EXPECT_NEAR(all.sum, one_by_one.state.sum, 1e-5f * all.sum);
    EXPECT_NEAR(sum, one_by_one.out, 1e-5f);
  }
}

}  // namespace
}  // namespace flux
