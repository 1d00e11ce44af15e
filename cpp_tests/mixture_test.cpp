// Mixtures of two patterns: the sets of keys against the specification, the CPU stages against hard routes.
#include "core/mixture.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "attend_case.h"
#include "core/mixture_parts.h"
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

// Of full attention and the sparse pattern of `p`, which its routing has alone: every key up to a query's own belongs
// to one part, whose blocks are exactly those that hold any.
void check_parts(const AttendParams& p, const TileShape& shape, const Tile& tile) {
  const TileView sparse = view_tile(p, shape, tile);
  const int32_t width = shape.kv_block, kv_len = sparse.kv_rows.size();
  for (int n = 0; n < kParts; ++n) {
    const PartView v(sparse, Part(n), width);
    std::set<int32_t> visited, useful;
    for (int32_t i = 0; i < v.blocks.size(); ++i) {
      ASSERT_TRUE(i == 0 || v.blocks[i] > v.blocks[i - 1]) << "blocks must ascend";
      visited.insert(v.blocks[i]);
    }
    const PartMask masked = v.mask();
    for (int32_t block = 0; block < ceil_div(kv_len, width); ++block) {
      bool all = true;
      for (int32_t token = 0; token < sparse.q_rows.size(); ++token)
        for (int32_t key = block * width; key < (block + 1) * width; ++key) {
          const bool full = key < kv_len && key <= sparse.q_pos + token, shown = full && sparse.sees(token, key);
          const bool in_part = n == kSparsePart ? shown : full && !shown;
          if (in_part) useful.insert(block);
          all &= in_part;
          ASSERT_EQ(visited.count(block) && key < kv_len && v.visible_keys(token).contain(key), in_part)
              << "part " << n << " token " << token << " key " << key;
        }
      ASSERT_TRUE(!visited.count(block) || masked(block * width, (block + 1) * width) == !all)
          << "part " << n << " block " << block;
    }
    ASSERT_EQ(visited, useful) << "part " << n;
  }
}

TEST(Mixture, FullAttentionIsTheSparsePatternAndTheRest) {
  Random random(305);
  test::ProblemOptions options;
  options.max_q_len = 200;
  for (int i = 0; i < 100; ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    options.block_lists = i % 2 == 0;
    test::Problem problem;
    random_problem(random, options, problem);
    AttendParams p = problem.params;
    p.routing.patterns[0] = {};
    p.routing.blocks[0] = {};
    ASSERT_TRUE(is_in_parts(p.routing));
    p.routing = sparse_alone(p.routing);
    const int32_t widest = p.routing.blocks[0].blocks ? p.routing.blocks[0].kv_width : 128;
    const TileShape shape{1 << random.integer(3, 6), random.chance(50) ? 64 : widest};
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < p.kv.num_heads; ++h)
        for (int32_t m = 0; m < tiles_in_seq_head(p, shape, b, h); ++m) {
          check_parts(p, shape, {b, h, m});
          if (HasFatalFailure()) return;
        }
  }
}

TEST(Mixture, QueryBlocksOfTheRestAreExactlyThoseThatSeeTheKeys) {
  Random random(306);
  for (int i = 0; i < 1500; ++i) {
    const Pattern pattern = test::random_pattern(random);
    const int32_t kv_len = random.integer(0, 300), q_end = kv_len, q_pos = q_end - random.integer(1, 350);
    const int32_t q_len = q_end - q_pos, group = random.integer(1, 6), block = random.integer(1, 70);
    const int32_t width = 8 << random.integer(0, 4);
    for (int32_t n = 0; n <= ceil_div(kv_len, width); ++n) {
      const int32_t kv_begin = n * width, kv_end = kv_begin + width;
      std::set<int32_t> blocks, visited;
      for (int32_t r = 0; r < q_len * group; ++r)
        for (int32_t key = kv_begin; key < min_of(kv_end, kv_len); ++key) {
          const int32_t q = q_pos + r / group;
          if (q >= key && !visible(pattern, q, key, kv_len)) blocks.insert(r / block);
        }
      const QueryBlocks found = rest_query_blocks(pattern, kv_begin, kv_end, kv_len, q_pos, q_len, group, block);
      for (int32_t m = found.first(); m < found.end(); m = found.after(m)) visited.insert(m);
      ASSERT_EQ(visited, blocks) << "sink " << pattern.sink << " window " << pattern.window << " last_q "
                                 << pattern.last_q << " align " << pattern.align << " keys from " << kv_begin;
    }
  }
}

TEST(Mixture, QueriesThatSeeAllOfSomeKeysAreNamed) {
  Random random(307);
  for (int i = 0; i < 3000; ++i) {
    const Pattern pattern = test::random_pattern(random);
    const int32_t kv_len = random.integer(1, 300), kv_begin = random.integer(0, kv_len - 1);
    const int32_t kv_end = random.integer(kv_begin + 1, kv_len);
    for (int part = 0; part < kParts; ++part) {
      const SeeingQueries all = queries_seeing_all(pattern, false, Part(part), kv_begin, kv_end, kv_len);
      for (int32_t q = kv_begin; q < kv_len; ++q) {
        int32_t seen = 0;
        for (int32_t key = kv_begin; key < min_of(kv_end, q + 1); ++key)
          seen += visible(pattern, q, key, kv_len) == (part == kSparsePart);
        if (seen == 0) continue;
        const bool named = (q >= all.near.begin && q < all.near.end) || (q >= all.last.begin && q < all.last.end);
        ASSERT_EQ(named, seen == kv_end - kv_begin)
            << "part " << part << " query " << q << " keys " << kv_begin << ".." << kv_end << " sink " << pattern.sink
            << " window " << pattern.window << " last_q " << pattern.last_q << " align " << pattern.align;
      }
    }
  }
}

TEST(Mixture, BlocksOfRowsThatSeeAllOfSomeKeysAreNamed) {
  Random random(308);
  for (int i = 0; i < 1000; ++i) {
    const int32_t q_pos = random.integer(-30, 100), q_len = random.integer(1, 60), group = random.integer(1, 5);
    const int32_t near = random.integer(0, 160), near_end = random.integer(near, 200);
    const SeeingQueries seeing{{near, random.chance(20) ? kUnlimited : near_end}, {max_of(near_end, 150), kUnlimited}};
    const RowsSeeingAll all(seeing, q_pos, q_len, group);
    const int32_t block = random.integer(1, 40);
    for (int32_t m = 0; m * block < q_len * group; ++m) {
      bool in_near = true, in_last = true;
      for (int32_t r = m * block; r < min_of((m + 1) * block, q_len * group); ++r) {
        const int32_t q = q_pos + r / group;
        in_near &= q >= seeing.near.begin && q < seeing.near.end;
        in_last &= q >= seeing.last.begin;
      }
      ASSERT_EQ(all.contain(m * block, (m + 1) * block), in_near || in_last) << "rows from " << m * block;
    }
  }
}

TEST(Mixture, OnlyAFullPatternThatShowsEveryKeyIsInParts) {
  Routing r;
  EXPECT_TRUE(is_in_parts(r));
  r.patterns[0] = {0, 100, 0, 1};
  EXPECT_FALSE(is_in_parts(r));
  const int32_t list = 0;
  r.patterns[0] = {};
  r.blocks[0].blocks = &list;
  EXPECT_FALSE(is_in_parts(r));
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
