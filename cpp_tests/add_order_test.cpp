// The order in which blocks of keys add up the queries' gradient: every tile is reached once by each block that it
// sees, and no worker waits for ever.
#include "core/add_order.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "random_problem.h"

namespace flux {
namespace {

struct Case {
  int32_t q_len, kv_len, group;
  int32_t q_pos() const { return kv_len - q_len; }
  int32_t tiles() const { return ceil_div(q_len * group, kTileRows); }
};

Case random_case(test::Random& random) {
  return {random.integer(0, 700), random.integer(0, 900), random.integer(1, 9)};
}

bool sees(const Case& c, int32_t tile, int32_t block) {
  for (int32_t row = tile * kTileRows; row < min_of((tile + 1) * kTileRows, c.q_len * c.group); ++row)
    if (block * kAddedKeys < c.kv_len && c.q_pos() + row / c.group >= block * kAddedKeys) return true;
  return false;
}

TEST(AddOrder, TilesAndBlocksAreThoseOfTheMask) {
  test::Random random(1);
  for (int i = 0; i < 300; ++i) {
    const Case c = random_case(random);
    SCOPED_TRACE(std::to_string(c.q_len) + " " + std::to_string(c.kv_len) + " " + std::to_string(c.group));
    for (int32_t block = 0; block < ceil_div(c.kv_len, kAddedKeys); ++block) {
      const Span tiles = seeing_tiles(block, c.kv_len, c.q_pos(), c.q_len, c.group);
      for (int32_t tile = 0; tile < c.tiles(); ++tile) {
        ASSERT_EQ(tile >= tiles.begin && tile < tiles.end, sees(c, tile, block)) << tile << " " << block;
        // The blocks that a tile sees are the first ones, so a block's number is its turn.
        ASSERT_EQ(block < blocks_seen(tile, c.q_pos(), c.q_len, c.group), sees(c, tile, block));
      }
    }
  }
}

TEST(AddOrder, EveryBlockOnceAndAfterThoseItWaitsFor) {
  test::Random random(2);
  for (int i = 0; i < 300; ++i) {
    const AddOrder order = add_order(random.integer(1, 40), random.integer(1, 60), random.integer(1, 132));
    ASSERT_GE(order.together, 1);
    std::set<std::pair<int32_t, int32_t>> seen;
    for (int32_t n = 0; n < order.size(); ++n) {
      const AddOrder::Item item = order[n];
      ASSERT_TRUE(item.seq_head >= 0 && item.seq_head < order.seq_heads && item.block < order.key_blocks);
      ASSERT_TRUE(item.block == 0 || seen.count({item.seq_head, item.block - 1}));
      ASSERT_TRUE(seen.insert({item.seq_head, item.block}).second);
    }
  }
}

TEST(AddOrder, SequenceHeadsTogetherKeepWorkersBusy) {
  EXPECT_EQ(add_order(8, 32, 132).together, 8);   // 4K keys
  EXPECT_EQ(add_order(8, 64, 132).together, 4);   // 8K
  EXPECT_EQ(add_order(8, 128, 132).together, 2);  // 16K
  EXPECT_EQ(add_order(8, 256, 132).together, 1);  // 32K
  EXPECT_EQ(add_order(1, 8, 132).together, 1);
}

// Workers as the kernel's thread blocks: each takes an item, and goes through its tiles from the last to the first.
TEST(AddOrder, WorkersNeverWaitForEver) {
  test::Random random(3);
  for (int i = 0; i < 200; ++i) {
    std::vector<Case> heads(random.integer(1, 6));
    int32_t blocks = 0;
    for (Case& c : heads) c = random_case(random), blocks = max_of(blocks, ceil_div(c.kv_len, kAddedKeys));
    const AddOrder order = add_order(int32_t(heads.size()), blocks, random.integer(1, 20));
    std::vector<std::vector<int32_t>> tickets;
    for (const Case& c : heads) tickets.emplace_back(c.tiles());
    struct Worker {
      AddOrder::Item item{};
      Span left{0, 0};
    };
    std::vector<Worker> workers(random.integer(1, 20));
    for (int32_t next = 0, moved = 1; moved > 0;) {
      moved = 0;
      for (Worker& w : workers) {
        if (w.left.size() == 0 && next < order.size()) {
          w.item = order[next++], ++moved;
          const Case& c = heads[w.item.seq_head];
          if (w.item.block * kAddedKeys >= c.kv_len) continue;
          w.left = seeing_tiles(w.item.block, c.kv_len, c.q_pos(), c.q_len, c.group);
        } else if (w.left.size() > 0 && random.integer(0, 3) > 0) {
          int32_t& ticket = tickets[w.item.seq_head][w.left.end - 1];
          if (ticket == w.item.block) ++ticket, --w.left.end;
          ++moved;
        } else if (w.left.size() > 0) {
          ++moved;  // slow
        }
      }
      // Somebody can go on: the one with the earliest item, at the least.
      int32_t ready = 0, busy = 0;
      for (const Worker& w : workers)
        if (w.left.size() > 0) ++busy, ready += tickets[w.item.seq_head][w.left.end - 1] == w.item.block;
      ASSERT_TRUE(busy == 0 || ready > 0);
    }
    for (size_t h = 0; h < heads.size(); ++h)
      for (int32_t tile = 0; tile < heads[h].tiles(); ++tile)
        ASSERT_EQ(tickets[h][tile], blocks_seen(tile, heads[h].q_pos(), heads[h].q_len, heads[h].group));
  }
}

}  // namespace
}  // namespace flux
