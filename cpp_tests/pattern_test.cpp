// What is derived from the specification, `visible`, against it.
#include "core/pattern.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "cuda/hidden_columns.h"
#include "random_problem.h"

namespace flux {
namespace {

using test::Random;

struct Case {
  Pattern pattern;
  std::vector<int32_t> blocks;
  BlockList list;
  int32_t q_begin, q_end, kv_len, block;
};

std::string describe(const Case& c) {
  std::string s = "sink " + std::to_string(c.pattern.sink) + " window " + std::to_string(c.pattern.window) +
                  " last_q " + std::to_string(c.pattern.last_q) + " align " + std::to_string(c.pattern.align) +
                  " queries " + std::to_string(c.q_begin) + ".." + std::to_string(c.q_end) + " kv_len " +
                  std::to_string(c.kv_len) + " block " + std::to_string(c.block);
  if (c.list.blocks) {
    s += " list of width " + std::to_string(c.list.width) + ":";
    for (int32_t b : c.blocks) s += " " + std::to_string(b);
  }
  return s;
}

// Queries [q_begin, q_end) of a sequence, some before its first key.
Case random_case(Random& random, bool with_list) {
  Case c;
  c.kv_len = random.integer(0, 300);
  c.q_end = random.integer(-20, c.kv_len);
  c.q_begin = c.q_end - random.integer(1, 70);
  c.block = 8 << random.integer(0, 4);
  if (with_list) {
    const int32_t width = c.block * random.integer(1, 3);
    // Made for a larger query block: may reach past this tile.
    c.blocks = test::random_blocks(random, min_of(c.q_end + random.integer(0, 200), c.kv_len) - 1, width);
    c.blocks.reserve(1);  // a list without entries still is a list
    c.list = {c.blocks.data(), int32_t(c.blocks.size()), width};
  } else {
    c.pattern = test::random_pattern(random);
  }
  return c;
}

QueryRange range_of(const Case& c) { return {c.pattern, c.list, {0, c.kv_len}, c.q_begin, c.q_end}; }

bool sees(const Case& c, int32_t q, int32_t k) { return q >= 0 && visible(c.pattern, q, k, c.kv_len, c.list); }

void check_blocks(const Case& c) {
  SCOPED_TRACE(describe(c));
  const KvBlocks blocks = kv_blocks(c.pattern, c.q_begin, c.q_end, c.kv_len, c.block, c.list);
  std::set<int32_t> visited;
  for (int32_t i = 0; i < blocks.size(); ++i) {
    ASSERT_TRUE(visited.insert(blocks[i]).second) << "block " << blocks[i] << " is visited twice";
    ASSERT_TRUE(i == 0 || blocks[i] > blocks[i - 1]) << "blocks must ascend";
  }
  for (int32_t b = 0; b <= ceil_div(c.kv_len, c.block); ++b) {
    bool useful = false;
    for (int32_t q = c.q_begin; q < c.q_end && !useful; ++q)
      for (int32_t k = b * c.block; k < min_of((b + 1) * c.block, c.kv_len) && !useful; ++k) useful = sees(c, q, k);
    ASSERT_EQ(visited.count(b), useful) << "block " << b;
    ASSERT_EQ(contains(blocks, b), useful) << "block " << b;
  }
}

void check_mask(const Case& c) {
  SCOPED_TRACE(describe(c));
  const KvBlocks blocks = kv_blocks(c.pattern, c.q_begin, c.q_end, c.kv_len, c.block, c.list);
  for (int32_t i = 0; i < blocks.size(); ++i) {
    const int32_t begin = blocks[i] * c.block, end = begin + c.block;
    bool all = true;
    for (int32_t q = c.q_begin; q < c.q_end && all; ++q)
      for (int32_t k = begin; k < end && all; ++k) all = k < c.kv_len && sees(c, q, k);
    const TileMask masked(range_of(c));
    ASSERT_EQ(masked(begin, end), !all) << "block " << blocks[i];
  }
}

TEST(Pattern, BlocksAreExactlyTheUsefulOnes) {
  Random random(1);
  for (int i = 0; i < 4000; ++i) check_blocks(random_case(random, false));
}
TEST(Pattern, ListedBlocksAreExactlyTheUsefulOnes) {
  Random random(2);
  for (int i = 0; i < 4000; ++i) check_blocks(random_case(random, true));
}
TEST(Pattern, MaskIsNeededExactlyWhereAPairIsHidden) {
  Random random(3);
  for (int i = 0; i < 4000; ++i) check_mask(random_case(random, false));
}
TEST(Pattern, MaskIsNeededExactlyWhereAPairOfAListIsHidden) {
  Random random(4);
  for (int i = 0; i < 4000; ++i) check_mask(random_case(random, true));
}

// What a query sees, as bounds; for a list, in the blocks of the list.
TEST(Pattern, BoundsHoldExactlyTheVisibleKeys) {
  Random random(5);
  for (int i = 0; i < 1000; ++i) {
    const Case c = random_case(random, i % 2);
    SCOPED_TRACE(describe(c));
    for (int32_t q = c.q_begin; q < c.q_end; ++q) {
      const VisibleKeys keys = visible_keys(c.pattern, q, {0, c.kv_len}, c.list);
      for (int32_t k = 0; k < c.kv_len; ++k) {
        const bool listed = !c.list.blocks || std::count(c.blocks.begin(), c.blocks.end(), k / c.list.width);
        ASSERT_EQ(keys.contain(k) && listed, sees(c, q, k)) << "query " << q << " key " << k;
      }
    }
  }
}

// The bits with which Hopper's kernels mask (csrc/cuda/hidden_columns.h), of bounds near the columns and far away.
TEST(Pattern, BitsOfHiddenColumnsAreTheColumnsThatAreNotSeen) {
  Random random(15);
  const auto bound = [&](int32_t base) {
    return random.chance(5) ? random.integer(0, 1) * (1 << 30) - 1 : base + random.integer(-140, 140);
  };
  for (int i = 0; i < 20000; ++i) {
    const int32_t base = random.integer(0, 1 << 20);
    const VisibleKeys keys{bound(base), bound(base), max_of(bound(base), 0)};
    const uint32_t hidden = cuda::columns_hidden(keys, base);
    for (int bit = 0; bit < 32; ++bit)
      ASSERT_EQ(hidden >> bit & 1, !keys.contain(base + bit / 2 * 8 + bit % 2))
          << "bit " << bit << " from " << base << " of [" << keys.begin << ", " << keys.last << "], sink " << keys.sink;
  }
}

// For queries [q, q_end) and any range of keys; with a list, of one of its blocks.
TEST(Pattern, NoneIsSeenExactlyWhereEveryPairIsHidden) {
  Random random(6);
  int none = 0;
  for (int i = 0; i < 4000; ++i) {
    const Case c = random_case(random, i % 2);
    SCOPED_TRACE(describe(c));
    const int32_t begin = random.integer(0, c.kv_len), end = begin + random.integer(1, c.block);
    if (c.list.blocks && (!std::count(c.blocks.begin(), c.blocks.end(), begin / c.list.width) ||
                          begin / c.list.width != (end - 1) / c.list.width))
      continue;
    bool any = false;
    for (int32_t q = c.q_begin; q < c.q_end; ++q)
      for (int32_t k = begin; k < end; ++k) any |= sees(c, q, k);
    ASSERT_EQ(sees_none(range_of(c), begin, end), !any) << begin << ".." << end;
    none += !any;
  }
  EXPECT_GT(none, 400);
}

// The other way round. Lists are kept by query block of `kListedQueries` queries, as block tables are.
constexpr int32_t kListedQueries = 8;

void check_query_blocks(Random& random, bool with_lists) {
  Case c = random_case(random, false);
  if (with_lists) c.pattern = {}, c.q_begin = c.q_end - random.integer(1, 400);  // more lists than a word has bits
  const int32_t group = random.integer(1, 6), kv_blocks = ceil_div(c.kv_len, c.block) + 1;
  const int32_t q_len = c.q_end - c.q_begin, rows = q_len * group, listed = ceil_div(q_len, kListedQueries);
  const int32_t block = with_lists ? 2 << random.integer(0, 2) : random.integer(1, 70);  // rows
  std::vector<std::vector<int32_t>> lists(listed);
  for (std::vector<int32_t>& list : lists) {
    list = test::random_blocks(random, max_of(c.q_end - 1, 0), c.block);
    list.reserve(1);
  }
  const auto list_of = [&](int32_t q) {
    if (!with_lists) return BlockList{};
    const std::vector<int32_t>& list = lists[(q - c.q_begin) / kListedQueries];
    return BlockList{list.data(), int32_t(list.size()), c.block};
  };
  for (int32_t n = 0; n < kv_blocks; ++n) {
    const int32_t kv_begin = n * c.block, kv_end = kv_begin + c.block;
    SCOPED_TRACE(describe(c) + " group " + std::to_string(group) + " rows " + std::to_string(block) + " keys from " +
                 std::to_string(kv_begin));
    ListedBits bits;
    std::vector<uint32_t> words(ceil_div(listed, 32));
    for (int32_t i = 0; i < listed; ++i)
      if (std::count(lists[i].begin(), lists[i].end(), n)) words[i / 32] |= 1u << i % 32;
    if (with_lists) bits = {words.data(), kListedQueries * group};
    std::set<int32_t> queries, blocks, visited;
    for (int32_t q = c.q_begin; q < c.q_end; ++q)
      for (int32_t k = kv_begin; k < min_of(kv_end, c.kv_len); ++k)
        if (q >= 0 && visible(c.pattern, q, k, c.kv_len, list_of(q))) queries.insert(q);
    for (int32_t r = 0; r < rows; ++r)
      if (queries.count(c.q_begin + r / group)) blocks.insert(r / block);

    const QueryBlocks found = query_blocks(c.pattern, kv_begin, kv_end, c.kv_len, c.q_begin, q_len, group, block, bits);
    int32_t last = -1;
    for (int32_t m = found.first(); m < found.end(); m = found.after(m)) {
      ASSERT_GT(m, last) << "blocks must ascend";
      visited.insert(last = m);
    }
    ASSERT_EQ(visited, blocks);
    if (with_lists) continue;
    const SeeingQueries seeing = seeing_queries(c.pattern, kv_begin, kv_end, c.kv_len, c.q_begin, c.q_end);
    ASSERT_LE(seeing.near.end, seeing.last.begin);
    for (int32_t q = c.q_begin; q < c.q_end; ++q)
      ASSERT_EQ((q >= seeing.near.begin && q < seeing.near.end) || (q >= seeing.last.begin && q < seeing.last.end),
                queries.count(q) == 1)
          << "query " << q;
  }
}

TEST(Pattern, QueryBlocksAreExactlyThoseThatSeeTheKeys) {
  Random random(7);
  for (int i = 0; i < 1500; ++i) check_query_blocks(random, false);
}
TEST(Pattern, QueryBlocksOfListsAreExactlyThoseThatSeeTheKeys) {
  Random random(8);
  for (int i = 0; i < 1500; ++i) check_query_blocks(random, true);
}

TEST(Pattern, PublishedDefaults) {
  const Pattern streaming{128, 2048, 0, 1};
  EXPECT_TRUE(visible(streaming, 5000, 127, 6000));
  EXPECT_FALSE(visible(streaming, 5000, 128, 6000));
  EXPECT_TRUE(visible(streaming, 5000, 5000 - 2047, 6000));  // the window counts the query's own token
  EXPECT_FALSE(visible(streaming, 5000, 5000 - 2048, 6000));
  EXPECT_FALSE(visible(streaming, 5000, 5001, 6000));
  const Pattern aligned{128, 2048, 0, 128};
  EXPECT_TRUE(visible(aligned, 5000, 128 * 40 - 2048, 6000));  // 5000 / 128 = 39
  EXPECT_FALSE(visible(aligned, 5000, 128 * 40 - 2049, 6000));
  const Pattern triangle{128, 2048, 128, 1};
  EXPECT_TRUE(visible(triangle, 6000 - 128, 500, 6000));
  EXPECT_FALSE(visible(triangle, 6000 - 129, 500, 6000));
}

TEST(Pattern, AListThatReachesSeveralBlocksPastASmallTileKeepsItsEarlierEntries) {
  const std::vector<int32_t> blocks{0, 3};
  const KvBlocks b = kv_blocks({}, 100, 116, 228, 64, {blocks.data(), 2, 64});
  ASSERT_EQ(b.size(), 1);
  EXPECT_EQ(b[0], 0);
}

TEST(Pattern, NoQueryVisitsNothing) {
  EXPECT_EQ(kv_blocks({}, 5, 5, 10, 4).size(), 0);
  EXPECT_EQ(kv_blocks({2, 3}, 10, 10, 10, 4).size(), 0);
}

TEST(Pattern, MillionsOfTokensDoNotOverflow) {
  const int32_t n = 1 << 28;
  const KvBlocks full = kv_blocks({}, n - 16, n, n, 64);
  EXPECT_EQ(full.size(), n / 64);
  const KvBlocks streaming = kv_blocks({128, 2048, 0, 1}, n - 16, n, n, 64);
  EXPECT_EQ(streaming.size(), 2 + 33);
  const int32_t most = 1 << 30;  // rows
  const SeeingQueries all = seeing_queries({0, most - 1, 0, 1}, most - 64, most, most, 0, most);
  EXPECT_EQ(all.near.begin, most - 64);
  EXPECT_EQ(all.near.end, most);
}

}  // namespace
}  // namespace flux
