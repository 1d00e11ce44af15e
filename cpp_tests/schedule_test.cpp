// The plan covers every visible pair once, evenly, and never more tiles than announced.
#include "core/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "cpu/cpu.h"
#include "random_problem.h"

namespace flux {
namespace {

using test::Problem;
using test::Random;

struct Planned {
  Problem problem;
  TileShape tile;
  int workers;
  cpu::Plan plan;
};

void random_plan(Random& random, Planned& s) {
  test::ProblemOptions o;
  o.max_q_len = 150;
  o.max_kv_len = 200;
  o.max_group = 2;
  o.packed = random.chance(30);
  o.block_lists = random.chance(40);
  o.per_head_lengths = !o.packed && random.chance(30);
  test::random_problem(random, o, s.problem);
  s.tile = {1 << random.integer(0, 6), 16 << random.integer(0, 2)};
  s.workers = random.integer(1, random.chance(20) ? 200 : 12);
  s.plan = cpu::plan(s.problem.params, s.tile, s.workers);
}

// f(worker, tile, its view, the key blocks of it that the worker owns)
template <typename F>
void for_each_piece(const Planned& s, F&& f) {
  for (int w = 0; w < s.workers; ++w) {
    const WorkRange& r = s.plan.ranges[w];
    if (empty(r)) continue;
    for (int32_t t = r.tile; t < tiles_end(r); ++t) {
      const TileView v = view_tile(s.problem.params, s.tile, s.plan.tiles[t]);
      f(w, t, v, tile_span(r, t, v.blocks.size()));
    }
  }
}

TEST(Schedule, EveryVisiblePairOnce) {
  Random random(11);
  for (int i = 0; i < 150; ++i) {
    Planned s;
    random_plan(random, s);
    const AttendParams& p = s.problem.params;
    // Times each (sequence, head, query row, key) is computed.
    std::map<std::pair<int32_t, int32_t>, std::vector<int32_t>> seen;
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < p.kv.num_heads; ++h)
        seen[{b, h}].assign(size_t(p.q.rows(b, h).size()) * p.kv.rows(b, h).size(), 0);
    for_each_piece(s, [&](int, int32_t, const TileView& v, const TileSpan& span) {
      const Span q = p.q.rows(v.tile.seq, v.tile.kv_head);
      const int32_t kv_len = v.kv_rows.size();
      auto& counts = seen[{v.tile.seq, v.tile.kv_head}];
      for (int32_t n = span.begin; n < span.end; ++n) {
        const int32_t begin = v.blocks[n] * s.tile.kv_block, end = min_of(begin + s.tile.kv_block, kv_len);
        for (int32_t row = 0; row < v.q_rows.size(); ++row)
          for (int32_t k = begin; k < end; ++k)
            if (v.sees(row, k)) ++counts[size_t(v.q_rows.begin - q.begin + row) * kv_len + k];
      }
    });
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < p.kv.num_heads; ++h) {
        const int32_t q_len = p.q.rows(b, h).size(), kv_len = p.kv.rows(b, h).size();
        const int32_t mode = p.routing.route[b * p.kv.num_heads + h];
        for (int32_t row = 0; row < q_len; ++row)
          for (int32_t k = 0; k < kv_len; ++k) {
            const int32_t pos = kv_len - q_len + row;
            const BlockList list = p.routing.blocks[mode](b, h, p.kv.num_heads, row);
            ASSERT_EQ((seen[{b, h}][size_t(row) * kv_len + k]), visible(p.routing.patterns[mode], pos, k, kv_len, list))
                << "sequence " << b << " head " << h << " query at " << pos << " key " << k;
          }
      }
  }
}

TEST(Schedule, EveryTileIsFinishedOnceAndEmptyOnesToo) {
  Random random(12);
  for (int i = 0; i < 500; ++i) {
    Planned s;
    random_plan(random, s);
    const size_t n = s.plan.tiles.size();
    std::vector<int32_t> blocks(n, 0), visits(n, 0), leaders(n, 0), next_block(n, 0);
    std::vector<bool> split(n, false);
    for_each_piece(s, [&](int, int32_t t, const TileView& v, const TileSpan& span) {
      ++visits[t];
      blocks[t] += span.end - span.begin;
      split[t] = split[t] || span.split;
      ASSERT_EQ(span.begin, next_block[t]) << "pieces must follow one another";
      next_block[t] = span.end;
      ASSERT_EQ(span.split, span.end - span.begin < v.blocks.size());
      ASSERT_TRUE(span.end > span.begin || v.blocks.size() == 0) << "a piece without work";
    });
    for (int w = 0; w < s.workers; ++w)
      if (const int32_t t = leads_tile(s.plan.ranges[w]); t >= 0) ++leaders[t];
    for (size_t t = 0; t < n; ++t) {
      const TileView v = view_tile(s.problem.params, s.tile, s.plan.tiles[t]);
      ASSERT_EQ(blocks[t], v.blocks.size());
      ASSERT_GE(visits[t], 1);
      ASSERT_EQ(visits[t] > 1, split[t]) << "a whole tile has one visitor, a cut one several";
      ASSERT_EQ(leaders[t], split[t]) << "one worker leads each cut tile, and no whole one";
    }
  }
}

TEST(Schedule, AWorkerCutsAtMostTwoTilesIntoDistinctSlots) {
  Random random(13);
  for (int i = 0; i < 500; ++i) {
    Planned s;
    random_plan(random, s);
    std::map<int32_t, int32_t> slots;
    std::vector<int> cut(s.workers, 0);
    for_each_piece(s, [&](int w, int32_t t, const TileView&, const TileSpan& span) {
      if (!span.split) return;
      ++cut[w];
      const int32_t slot = partial_slot(s.plan.ranges[w], w, t);
      ASSERT_EQ(slot / 2, w);
      ASSERT_TRUE(slots.emplace(slot, t).second) << "slot " << slot << " is used twice";
    });
    for (int w = 0; w < s.workers; ++w) ASSERT_LE(cut[w], 2);
  }
}

TEST(Schedule, PiecesOfATileAreFoundWithoutTheRanges) {
  Random random(16);
  for (int i = 0; i < 500; ++i) {
    Planned s;
    random_plan(random, s);
    const auto n = int32_t(s.plan.tiles.size());
    const int32_t workers = sharing_workers(s.plan.cost.back(), n, s.workers);
    std::vector<std::vector<int32_t>> slots(n);
    for (int32_t w = 0; w < workers && n > 0; ++w) {
      const WorkRange r = work_range(s.plan.cost.data(), n, w, workers);
      for (int32_t t = r.tile; t < tiles_end(r); ++t) slots[t].push_back(partial_slot(r, w, t));
    }
    for (int32_t t = 0; t < n; ++t) {
      const TilePieces pieces = tile_pieces(s.plan.cost.data(), n, t, workers);
      ASSERT_EQ(size_t(pieces.count), slots[t].size());
      for (int32_t p = 0; p < pieces.count; ++p) ASSERT_EQ(pieces.slot(p), slots[t][p]);
    }
  }
}

TEST(Schedule, LoadIsEven) {
  Random random(14);
  for (int i = 0; i < 500; ++i) {
    Planned s;
    random_plan(random, s);
    std::vector<int64_t> load(s.workers, 0);
    for_each_piece(s, [&](int w, int32_t, const TileView&, const TileSpan& span) {
      load[w] += span.end - span.begin + (span.begin == 0 ? kTileOverhead : 0);
    });
    const int64_t total = s.plan.cost.back();
    ASSERT_EQ(std::accumulate(load.begin(), load.end(), int64_t(0)), total);
    for (int64_t l : load) {
      ASSERT_LE(l, total / s.workers + 1 + kTileOverhead);
      ASSERT_GE(l, total / s.workers - kTileOverhead);
    }
  }
}

TEST(Schedule, NeverMoreTilesThanAnnounced) {
  Random random(15);
  for (int i = 0; i < 500; ++i) {
    Planned s;
    random_plan(random, s);
    ASSERT_LE(int64_t(s.plan.tiles.size()), max_tiles(s.problem.params, s.tile));
  }
}

TEST(Schedule, LongestTilesOfASequenceHeadComeFirst) {
  AttendParams p;
  p.batch = p.q.num_heads = p.kv.num_heads = 1;
  p.q.max_len = p.q.rows.capacity = p.kv.rows.capacity = 1000;
  p.q.total_rows = 1000;
  const cpu::Plan plan = cpu::plan(p, {64, 64}, 3);
  ASSERT_EQ(plan.tiles.size(), 16u);
  for (size_t t = 1; t < plan.tiles.size(); ++t) {
    EXPECT_EQ(plan.tiles[t].q_block, plan.tiles[t - 1].q_block - 1);
    if (t + 1 < plan.cost.size()) {
      EXPECT_LE(plan.cost[t + 1] - plan.cost[t], plan.cost[t] - plan.cost[t - 1]);
    }
  }
}

// Whatever order the sequence heads are handed out in.
TEST(Schedule, TilesHandedOutWholeEndInTime) {
  Random random(31);
  int whole_plans = 0;
  for (int i = 0; i < 3000; ++i) {
    const int32_t workers = random.integer(1, 40), num_seq_heads = random.integer(1, 12);
    std::vector<std::vector<int32_t>> seq_heads(num_seq_heads);  // costs of their tiles
    std::vector<int64_t> cost{0};
    std::vector<Span> spans;
    for (auto& tiles : seq_heads) {
      const auto begin = int32_t(cost.size()) - 1;
      const int32_t longest = random.integer(1, random.chance(20) ? 300 : 20);
      for (int32_t t = random.integer(0, 30); t > 0; --t) tiles.push_back(random.integer(1, longest));
      for (const int32_t c : tiles) cost.push_back(cost.back() + c);
      spans.push_back({begin, int32_t(cost.size()) - 1});
    }
    const auto num_tiles = int32_t(cost.size()) - 1;
    bool whole = true;
    for (const Span& siblings : spans)
      for (int32_t t = siblings.begin; t < siblings.end; ++t)
        whole &=
            !ends_late(work_before(cost.data(), num_tiles, t, siblings), cost[t + 1] - cost[t], cost.back(), workers);
    if (!whole) continue;
    ++whole_plans;
    for (int order = 0; order < 3; ++order) {
      for (int n = num_seq_heads - 1; n > 0; --n) std::swap(seq_heads[n], seq_heads[random.integer(0, n)]);
      std::vector<int64_t> free(workers, 0);  // when each worker is
      for (const auto& tiles : seq_heads)
        for (const int32_t c : tiles) *std::min_element(free.begin(), free.end()) += c;
      const int64_t end = *std::max_element(free.begin(), free.end()) * workers, total = cost.back();
      EXPECT_LE(end, std::max(total + total / 8 + int64_t(kSplitBlocks) * workers, total + total / kSmallPart));
    }
  }
  EXPECT_GT(whole_plans, 300);
}

// Sequence heads that take turns, the longest tiles first.
TEST(Schedule, TilesOfSequenceHeadsInTurnEndInTime) {
  Random random(32);
  int whole_plans = 0;
  for (int i = 0; i < 3000; ++i) {
    const int32_t workers = random.integer(1, 40), num_seq_heads = random.integer(2, 12);
    const int32_t tiles_each = random.integer(1, 30);
    std::vector<int64_t> cost{0};
    for (int32_t n = 0; n < num_seq_heads; ++n) {
      std::vector<int32_t> tiles(tiles_each);
      for (int32_t& c : tiles) c = random.integer(1, 40);
      std::sort(tiles.rbegin(), tiles.rend());
      for (const int32_t c : tiles) cost.push_back(cost.back() + c);
    }
    std::vector<int64_t> free(workers, 0);  // when each worker is
    bool whole = true;
    int64_t before = 0;
    for (int32_t place = 0; place < tiles_each; ++place) {
      const Turn turn = turn_of(cost.data(), num_seq_heads, tiles_each, place);
      whole &= !ends_late(turn.before, turn.largest, cost.back(), workers);
      for (int32_t n = 0; n < num_seq_heads; ++n) {
        const int64_t c = cost[n * tiles_each + place + 1] - cost[n * tiles_each + place];
        EXPECT_LE(c, turn.largest);
        *std::min_element(free.begin(), free.end()) += c;
        before += c;
      }
      EXPECT_EQ(turn.before + turn.largest, before);
    }
    EXPECT_EQ(before, cost.back());
    if (!whole) continue;
    ++whole_plans;
    const int64_t end = *std::max_element(free.begin(), free.end()) * workers, total = cost.back();
    EXPECT_LE(end, std::max(total + total / 8 + int64_t(kSplitBlocks) * workers, total + total / kSmallPart));
  }
  EXPECT_GT(whole_plans, 300);
}

// Where the host says that no plan is needed, every tile is handed out once, and none ends late whatever the routes
// are.
TEST(Schedule, AKnownOrderNeedsNoPlan) {
  Random random(33);
  int in_turn = 0, in_line = 0, planned = 0;
  for (int i = 0; i < 3000; ++i) {
    AttendParams p;
    p.batch = random.integer(1, 6);
    p.kv.num_heads = p.q.num_heads = random.integer(1, 8);
    p.head_dim = 128;
    p.q.max_len = p.q.rows.capacity = random.integer(1, 400);
    p.kv.rows.capacity = p.q.max_len + (random.chance(50) ? 0 : random.integer(0, 3000));
    p.q.total_rows = int64_t(p.batch) * p.q.max_len;
    for (Pattern& pattern : p.routing.patterns) pattern = test::random_pattern(random);
    const int32_t seq_heads = p.batch * p.kv.num_heads, workers = random.integer(1, 140);
    std::vector<int32_t> route(seq_heads);
    const int32_t sparse = random.integer(0, 100);
    for (int32_t& r : route) r = random.chance(sparse);
    if (random.chance(80)) p.routing.route = route.data();
    p.routing.stride_b = p.kv.num_heads;
    p.routing.stride_h = 1;
    const TileShape tile{1 << random.integer(0, 6), 16 << random.integer(0, 3)};
    const TileOrder order = known_order(p, tile, workers);
    if (order == TileOrder::kPlanned) {
      ++planned;
      continue;
    }
    ++(order == TileOrder::kInTurn ? in_turn : in_line);
    const int32_t tiles_each = ceil_div(p.q.max_len, tile.q_tokens), num_tiles = tiles_each * seq_heads;
    ASSERT_EQ(num_tiles, max_tiles(p, tile));
    std::vector<int> seen(num_tiles, 0);
    std::vector<int64_t> cost{0}, free(workers, 0);
    for (int32_t n = 0; n < seq_heads; ++n)
      for (int32_t place = 0; place < tiles_each; ++place) {
        const Tile t{n / p.kv.num_heads, n % p.kv.num_heads, tiles_each - 1 - place};
        cost.push_back(cost.back() + tile_cost(view_tile(p, tile, t)));
      }
    int64_t largest = 0;
    for (int32_t t = 0; t < num_tiles; ++t) largest = std::max(largest, cost[t + 1] - cost[t]);
    const bool waves = waves_end_in_time(num_tiles, largest, cost.back(), workers);
    for (int32_t i = 0; i < num_tiles; ++i) {
      const Tile t = tile_at(order, i, seq_heads, p.kv.num_heads, tiles_each);
      const int32_t seq_head = t.seq * p.kv.num_heads + t.kv_head, place = tiles_each - 1 - t.q_block;
      ASSERT_EQ(seen[seq_head * tiles_each + place]++, 0);
      *std::min_element(free.begin(), free.end()) += tile_cost(view_tile(p, tile, t));
      if (order == TileOrder::kInLine) {
        const Span siblings{seq_head * tiles_each, (seq_head + 1) * tiles_each};
        const int32_t own = seq_head * tiles_each + place;
        ASSERT_TRUE(waves || !ends_late(work_before(cost.data(), num_tiles, own, siblings), cost[own + 1] - cost[own],
                                        cost.back(), workers));
      }
    }
    for (int32_t place = 0; order == TileOrder::kInTurn && place < tiles_each; ++place) {
      const Turn turn = turn_of(cost.data(), seq_heads, tiles_each, place);
      ASSERT_TRUE(waves || !ends_late(turn.before, turn.largest, cost.back(), workers));
    }
    const int64_t end = *std::max_element(free.begin(), free.end()) * workers, total = cost.back();
    EXPECT_LE(end, total + total / 8 + int64_t(kSplitBlocks) * workers);
  }
  EXPECT_GT(in_turn, 300);
  EXPECT_GT(in_line, 100);
  EXPECT_GT(planned, 300);
}

// Waves of tiles that differ end in time too, in any order.
TEST(Schedule, TilesThatComeInWavesEndInTime) {
  Random random(34);
  int in_time = 0;
  for (int i = 0; i < 3000; ++i) {
    const int32_t workers = random.integer(1, 140), largest = random.integer(1, 1000);
    std::vector<int32_t> cost(random.integer(1, 600));
    int64_t total = 0;
    for (int32_t& c : cost) total += c = random.integer(random.chance(20) ? 1 : (19 * largest + 19) / 20, largest);
    if (!waves_end_in_time(int32_t(cost.size()), *std::max_element(cost.begin(), cost.end()), total, workers)) continue;
    ++in_time;
    std::vector<int64_t> free(workers, 0);
    for (const int32_t c : cost) *std::min_element(free.begin(), free.end()) += c;
    EXPECT_LE(*std::max_element(free.begin(), free.end()) * workers,
              total + total / 8 + int64_t(kSplitBlocks) * workers);
  }
  EXPECT_GT(in_time, 100);
}

// Tiles that nobody counts: each is one worker's, and if sequence heads are alike, the end is as even as promised.
TEST(Schedule, UncountedItems) {
  Random random(35);
  for (int i = 0; i < 1000; ++i) {
    const int32_t workers = random.integer(2, 140), seq_heads = random.integer(2, kSeqHeadsInTurn);
    const int32_t tiles_each = random.integer(1, 64), num_tiles = tiles_each * seq_heads;
    if (!is_uncounted(TileOrder::kInTurn, num_tiles, workers)) continue;
    EXPECT_FALSE(is_uncounted(TileOrder::kInLine, num_tiles, workers));
    std::vector<int> taken(num_tiles, 0);
    int64_t total = 0, longest = 0;
    for (int32_t w = 0; w < workers; ++w) {
      int64_t load = 0;
      for (int32_t wave = 0, item = w; item < num_tiles; item = item_uncounted(w, ++wave, workers)) {
        ++taken[item];
        load += tiles_each - item / seq_heads + kTileOverhead;  // causal tiles, a block longer each
      }
      total += load;
      longest = std::max(longest, load);
    }
    EXPECT_EQ(std::count(taken.begin(), taken.end(), 1), num_tiles);
    EXPECT_LE(longest * workers, total + total / 8 + int64_t(kSplitBlocks + tiles_each) * workers);
  }
}

// Tiles that are cut apart: no worker has parts of two, each has something, and none has much more than even shares.
TEST(Schedule, TilesCutApart) {
  Random random(36);
  int found = 0;
  for (int i = 0; i < 3000; ++i) {
    const int32_t workers = random.integer(1, 140), most = random.integer(1, 2000);
    const auto num_tiles = random.integer(1, 150);
    const int32_t least = random.chance(40) ? most - most / 50 : 1;
    std::vector<int64_t> own(num_tiles);
    int64_t total = 0;
    for (int64_t& c : own) total += c = random.integer(least, most);
    const auto [smallest, largest] = std::minmax_element(own.begin(), own.end());
    const Cut<int64_t> cut = cut_apart<int64_t>(total, *smallest, *largest, num_tiles, workers, [&](int64_t share) {
      int64_t shares = 0;
      for (const int64_t c : own) shares += ceil_div_64(c, share);
      return shares;
    });
    ASSERT_LE(cut.num_workers, workers);
    if (cut.unit == 1 && cut.num_workers == workers) continue;
    ++found;
    std::vector<int64_t> cost{0};
    for (const int64_t c : own) cost.push_back(cost.back() + ceil_div_64(c, cut.unit) * cut.unit);
    const int64_t even = ceil_div_64(total, workers);
    for (int32_t w = 0; w < cut.num_workers; ++w) {
      const int64_t begin = share_unit(cost.back(), w, cut.num_workers);
      const int64_t end = share_unit(cost.back(), w + 1, cut.num_workers);
      const auto tile = int32_t(std::upper_bound(cost.begin(), cost.end(), begin) - cost.begin()) - 1;
      ASSERT_LE(end, cost[tile + 1]);
      ASSERT_LT(begin, cost[tile] + own[tile]) << "a share of nothing";
      ASSERT_LE(end - begin, even + even / 8 + kTileOverhead);
    }
  }
  EXPECT_GT(found, 300);
}

// Lengths on the device, lists and many tiles are left to the planner.
TEST(Schedule, AnOrderThatIsNotKnown) {
  AttendParams p;
  p.batch = 2, p.kv.num_heads = p.q.num_heads = 4, p.head_dim = 64;
  p.q.max_len = p.q.rows.capacity = p.kv.rows.capacity = 256;
  p.q.total_rows = 512;
  const TileShape tile{32, 128};
  EXPECT_EQ(known_order(p, tile, 132), TileOrder::kInTurn);
  const int32_t bounds[2] = {100, 256};
  for (const int32_t** bound : {&p.q.rows.begin, &p.q.rows.end, &p.kv.rows.begin, &p.kv.rows.end}) {
    *bound = bounds;
    EXPECT_EQ(known_order(p, tile, 132), TileOrder::kPlanned);
    *bound = nullptr;
  }
  p.routing.blocks[1].blocks = bounds;
  EXPECT_EQ(known_order(p, tile, 132), TileOrder::kPlanned);
  p.routing.blocks[1].blocks = nullptr;
  EXPECT_EQ(known_order(p, {1, 128}, 132), TileOrder::kInTurn);
  p.q.max_len = p.q.rows.capacity = p.kv.rows.capacity = kTilesKnown + 1;
  EXPECT_EQ(known_order(p, {1, 128}, 132), TileOrder::kPlanned);
}

// A short chunk over a long cache beside a long prompt: one long tile, in whichever place.
TEST(Schedule, ALongTileIsNotHandedOutWhole) {
  constexpr int32_t kTiles = 2000, kWorkers = 132;
  for (const int32_t at : {0, 1000, kTiles}) {
    std::vector<int64_t> cost{0};
    for (int32_t t = 0; t <= kTiles; ++t) cost.push_back(cost.back() + (t == at ? 512 : 33));
    EXPECT_TRUE(ends_late(work_before(cost.data(), kTiles + 1, at, {at, at + 1}), 512, cost.back(), kWorkers));
  }
}

TEST(Schedule, NothingToDo) {
  AttendParams p;
  p.batch = 2;
  p.q.num_heads = p.kv.num_heads = 1;
  const cpu::Plan plan = cpu::plan(p, {64, 64}, 4);
  EXPECT_TRUE(plan.tiles.empty());
  for (const WorkRange& r : plan.ranges) EXPECT_TRUE(empty(r));
}

TEST(RowSpans, ClampWhatLeadsOutside) {
  const int32_t begin[] = {-5, 7, 3}, end[] = {4, 3, 900};
  RowSpans spans;
  spans.begin = begin;
  spans.end = end;
  spans.capacity = 10;
  EXPECT_EQ(spans(0, 0).begin, 0);
  EXPECT_EQ(spans(0, 0).end, 4);
  EXPECT_EQ(spans(1, 0).size(), 0);
  EXPECT_EQ(spans(2, 0).end, 10);
}

}  // namespace
}  // namespace flux
