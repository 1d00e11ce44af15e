// The plan stage on CUDA against a twin on the host made of the same functions of core/schedule.h, with equal bits.
// Runs on a GPU, and, as simt_test, without one (see simt/cuda_runtime.h).
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/cuda.h"
#include "device_case.h"
#ifdef FLUX_SIMT
#include "cuda/dependent_launch.h"
#include "cuda/plan.h"
#endif

namespace flux::cuda {
namespace {

struct HostPlan {
  PlanHeader header{};
  std::vector<Tile> tiles;
  std::vector<WorkRange> ranges;
};

int32_t largest(const std::vector<int32_t>& cost) {
  return cost.empty() ? 0 : *std::max_element(cost.begin(), cost.end());
}

int32_t smallest(const std::vector<int32_t>& cost) {
  return cost.empty() ? 0 : *std::min_element(cost.begin(), cost.end());
}
int64_t sum(const std::vector<int32_t>& cost) { return std::accumulate(cost.begin(), cost.end(), int64_t(0)); }

// Shares of a line whose tiles are rounded up to multiples of a unit.
std::vector<WorkRange> cut_at(const std::vector<int64_t>& cost, const Cut<int64_t>& cut) {
  std::vector<int64_t> begin{0};
  for (const int64_t c : cost) begin.push_back(begin.back() + ceil_div_64(c, cut.unit) * cut.unit);
  std::vector<WorkRange> ranges;
  for (int32_t w = 0; w < cut.num_workers; ++w)
    ranges.push_back(work_range(begin.data(), int32_t(cost.size()), w, cut.num_workers));
  return ranges;
}

// Apart, if shares that are little larger than even ones do; else evenly.
Cut<int64_t> how_to_cut(const std::vector<int32_t>& cost, int32_t num_workers) {
  const auto num_tiles = int32_t(cost.size());
  return cut_apart<int64_t>(sum(cost), smallest(cost), largest(cost), num_tiles,
                            sharing_workers(sum(cost), num_tiles, num_workers), [&](int64_t share) {
                              int64_t shares = 0;
                              for (const int32_t c : cost) shares += ceil_div_64(c, share);
                              return shares;
                            });
}
std::vector<WorkRange> cut(const std::vector<int32_t>& cost, int32_t num_workers) {
  return cut_at({cost.begin(), cost.end()}, how_to_cut(cost, num_workers));
}

std::vector<Tile> tiles_in_turn(const AttendParams& problem, int32_t tiles_each) {
  std::vector<Tile> tiles;
  for (int32_t i = tiles_each - 1; i >= 0; --i)
    for (int32_t n = 0; n < num_seq_heads(problem); ++n)
      tiles.push_back({n / problem.kv.num_heads, n % problem.kv.num_heads, i});
  return tiles;
}

// The line of turns, cut apart, where that can be done: the last tile of a turn is rounded up for all.
bool cut_turns(const AttendParams& problem, const std::vector<int32_t>& cost, int32_t tiles_each, int32_t num_workers,
               HostPlan& plan) {
  std::vector<int32_t> turns(tiles_each);
  for (size_t t = 0; t < cost.size(); ++t) turns[t % tiles_each] += cost[t];
  const int32_t sharing = sharing_workers(sum(cost), int32_t(cost.size()), num_workers);
  const Cut<int64_t> cut = cut_turns_apart<int64_t>(sum(cost), smallest(turns), largest(turns), tiles_each, sharing);
  if (cut.unit == 1) return false;
  std::vector<int64_t> in_turn;
  for (int32_t i = 0; i < tiles_each; ++i) {
    for (int32_t n = 0; n < num_seq_heads(problem); ++n) in_turn.push_back(cost[n * tiles_each + i]);
    in_turn.back() += cut.unit - turns[i];
  }
  plan.tiles = tiles_in_turn(problem, tiles_each);
  plan.ranges = cut_at(in_turn, {1, cut.num_workers});
  return true;
}

int turns_cut = 0;  // problems whose turns are cut apart

HostPlan plan_on_host(const AttendParams& problem, const TileShape& tile, int32_t num_workers) {
  HostPlan p;
  std::vector<int64_t> cost{0}, cost_of(num_seq_heads(problem), 0);
  std::vector<Span> tiles_of;  // by sequence head
  const auto add_tiles = [&](int32_t seq_head) {
    const int32_t b = seq_head / problem.kv.num_heads, h = seq_head % problem.kv.num_heads;
    const auto begin = int32_t(p.tiles.size());
    for (int32_t m = tiles_in_seq_head(problem, tile, b, h) - 1; m >= 0; --m) p.tiles.push_back({b, h, m});
    tiles_of.push_back({begin, int32_t(p.tiles.size())});
  };
  for (int32_t n = 0; n < num_seq_heads(problem); ++n) add_tiles(n);
  for (const Tile& t : p.tiles) {
    const int32_t c = tile_cost(view_tile(problem, tile, t));
    cost.push_back(cost.back() + c);
    cost_of[t.seq * problem.kv.num_heads + t.kv_head] += c;
  }
  const auto num_tiles = int32_t(p.tiles.size());
  bool in_turn = true;
  for (int32_t n = 0; n < num_seq_heads(problem); ++n) {
    const int32_t longest = problem.kv.rows(n / problem.kv.num_heads, n % problem.kv.num_heads).size();
    in_turn &=
        takes_turns(num_seq_heads(problem), longest, problem.head_dim) && tiles_of[n].size() == tiles_of[0].size();
  }
  const int32_t tiles_each = tiles_of[0].size();
  bool whole = true;
  for (int32_t t = 0; t < num_tiles; ++t) {
    const Span siblings = tiles_of[p.tiles[t].seq * problem.kv.num_heads + p.tiles[t].kv_head];
    int64_t before = work_before(cost.data(), num_tiles, t, siblings), own = cost[t + 1] - cost[t];
    if (in_turn) {
      const Turn turn = turn_of(cost.data(), num_seq_heads(problem), tiles_each, t - siblings.begin);
      before = turn.before, own = turn.largest;
    }
    whole &= !ends_late(before, own, cost.back(), num_workers);
  }
  std::vector<int32_t> own(num_tiles);
  for (int32_t t = 0; t < num_tiles; ++t) own[t] = int32_t(cost[t + 1] - cost[t]);
  whole |= waves_end_in_time(num_tiles, largest(own), cost.back(), num_workers);
  if (!whole) {
    p.ranges = cut(own, num_workers);
    const bool even =
        std::all_of(tiles_of.begin(), tiles_of.end(), [&](const Span& s) { return s.size() == tiles_of[0].size(); });
    if (even && num_tiles <= 1024 && how_to_cut(own, num_workers).unit == 1 &&
        cut_turns(problem, own, tiles_each, num_workers, p))
      ++turns_cut;
    p.header = {num_tiles, int32_t(p.ranges.size()), 0, 0};
    return p;
  }
  p.header = {num_tiles, num_tiles, 1, 0};
  if (in_turn) {
    p.tiles = tiles_in_turn(problem, tiles_each);
    return p;
  }
  std::vector<int32_t> order(num_seq_heads(problem));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return cost_of[a] > cost_of[b]; });
  p.tiles.clear();
  for (int32_t seq_head : order) add_tiles(seq_head);
  return p;
}

void expect_equal_plans(int32_t batch, int32_t kv_heads, int32_t max_q, int32_t max_kv, TileShape tile,
                        int32_t num_workers, uint32_t seed, bool equal_q = false, int32_t most_last_q = 200) {
  SCOPED_TRACE(testing::Message() << "batch " << batch << ", heads " << kv_heads << ", q " << max_q << ", kv " << max_kv
                                  << ", workers " << num_workers << ", seed " << seed);
  std::mt19937 random(seed);
  const auto up_to = [&](int32_t n) { return int32_t(random() % uint32_t(n + 1)); };
  std::vector<int32_t> q_end(batch), kv_end(batch), route(size_t(batch) * kv_heads);
  for (int32_t b = 0; b < batch; ++b) q_end[b] = equal_q ? max_q : up_to(max_q), kv_end[b] = up_to(max_kv);
  for (int32_t& r : route) r = up_to(1);
  AttendParams p;
  p.batch = batch;
  p.kv.num_heads = kv_heads;
  p.q.num_heads = 4 * kv_heads;
  p.head_dim = 128;
  p.q.max_len = p.q.rows.capacity = max_q;
  p.kv.rows.capacity = max_kv;
  p.q.total_rows = int64_t(batch) * max_q;
  p.routing.stride_b = kv_heads;
  p.routing.stride_h = 1;
  p.routing.patterns[1] = {128, 512, up_to(most_last_q), 1};
  AttendParams on_host = p;
  on_host.q.rows.end = q_end.data();
  on_host.kv.rows.end = kv_end.data();
  on_host.routing.route = route.data();
  const DeviceArray<int32_t> d_q(q_end), d_kv(kv_end), d_route(route);
  p.q.rows.end = d_q.get();
  p.kv.rows.end = d_kv.get();
  p.routing.route = d_route.get();

  Instance instance{};  // its rows alone count here
  instance.tile_rows = 16;
  AttendConfig c;
  c.instance = &instance;
  c.tile = tile;
  c.num_workers = num_workers;
  const DeviceArray<char> memory(std::vector<char>(lay_out(p, c, nullptr).bytes, char(0xff)));
  const Workspace w = lay_out(p, c, memory.get());
  for (int repeat = 0; repeat < 2; ++repeat) CUDA_OK(plan(p, c, w.plan, nullptr));
  CUDA_OK(cudaDeviceSynchronize());

  const HostPlan expected = plan_on_host(on_host, tile, num_workers);
  const PlanHeader header = to_host(w.plan.header, 1)[0];
  EXPECT_EQ(header.num_tiles, expected.header.num_tiles);
  EXPECT_EQ(header.num_items, expected.header.num_items);
  EXPECT_EQ(header.whole_tiles, expected.header.whole_tiles);
  EXPECT_EQ(header.next_item, 0);
  const auto tiles = to_host(w.plan.tiles, expected.tiles.size());
  for (size_t i = 0; i < tiles.size(); ++i) {
    ASSERT_EQ(tiles[i].seq, expected.tiles[i].seq) << i;
    ASSERT_EQ(tiles[i].kv_head, expected.tiles[i].kv_head) << i;
    ASSERT_EQ(tiles[i].q_block, expected.tiles[i].q_block) << i;
  }
  const auto ranges = to_host(w.plan.ranges, expected.ranges.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    ASSERT_EQ(ranges[i].tile, expected.ranges[i].tile) << i;
    ASSERT_EQ(ranges[i].block, expected.ranges[i].block) << i;
    ASSERT_EQ(ranges[i].end_tile, expected.ranges[i].end_tile) << i;
    ASSERT_EQ(ranges[i].end_block, expected.ranges[i].end_block) << i;
  }
}

class Plan : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no GPU";
  }
};

TEST_F(Plan, Decode) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    expect_equal_plans(1, 8, 1, 100000, {4, 64}, 264, seed);
    expect_equal_plans(64, 8, 1, 40000, {4, 64}, 264, seed);
    expect_equal_plans(300, 8, 1, 3000, {4, 64}, 264, seed);  // more sequence heads than shared memory holds
    expect_equal_plans(1500, 2, 1, 64, {4, 64}, 16, seed);
  }
}

TEST_F(Plan, Prefill) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    expect_equal_plans(1, 1, 5, 5, {32, 64}, 132, seed);
    expect_equal_plans(3, 4, 2000, 3000, {32, 64}, 132, seed);
    expect_equal_plans(8, 8, 20000, 20000, {32, 128}, 132, seed);  // whole tiles, sorted
    expect_equal_plans(200, 8, 300, 3000, {32, 64}, 132, seed);
    expect_equal_plans(1, 8, 4096, 4096, {32, 128}, 132, seed, true);  // in turns
    expect_equal_plans(4, 8, 512, 1500, {32, 64}, 40, seed, true);
    expect_equal_plans(1, 5, 128, 3000, {32, 64}, 132, seed, true);  // would, but tiles end late
  }
}

TEST_F(Plan, ChunksOverACache) {
  turns_cut = 0;
  for (uint32_t seed = 0; seed < 5; ++seed) {
    expect_equal_plans(1, 8, 256, 32768, {32, 128}, 132, seed, true, 0);
    expect_equal_plans(1, 8, 2048, 60000, {32, 128}, 132, seed, true, 0);  // more tiles than workers
    expect_equal_plans(2, 4, 100, 20000, {32, 128}, 132, seed, true, 0);
    expect_equal_plans(1, 40, 1000, 60000, {32, 128}, 132, seed, true, 0);  // more tiles than the planner has threads
  }
  EXPECT_GT(turns_cut, 5);
}

#ifdef FLUX_SIMT
struct Shared {
  WorkRange of_warp, of_block;
};

__global__ void share_kernel(const int32_t* cost, int32_t num_tiles, Shared* shared, TilePieces* pieces) {
  __shared__ InlineLine line;
  const int32_t lane = threadIdx.x, worker = blockIdx.x;
  for (int32_t t = lane; t < num_tiles; t += 32) line.cost[t] = cost[t];
  __syncwarp();
  share_out(line, num_tiles, gridDim.x);
  __syncwarp();
  const WorkRange of_block = share_of(line, num_tiles, worker);
  WorkRange of_warp = of_block;
  if (num_tiles <= kWarpTiles)
    of_warp = share_of_warp(lane < num_tiles ? cost[lane] : 1234, num_tiles, worker, gridDim.x);
  if (lane == 0) shared[worker] = {of_warp, of_block};
  for (int32_t t = worker; lane == 0 && t < num_tiles; t += gridDim.x)
    pieces[t] = tile_pieces(line.begin, num_tiles, t, line.workers);
}

// The line of work, where every tile has as many whole shares as it needs: one worker each. (Found by walking, not
// with the functions that are tested.)
std::vector<WorkRange> cut_into_shares(const std::vector<int32_t>& cost, int64_t share) {
  std::vector<WorkRange> ranges;
  for (int32_t t = 0; t < int32_t(cost.size()); ++t)
    for (int64_t unit = 0; unit < cost[t]; unit += share) {
      const Position begin = position_in(t, int32_t(unit));
      const bool last = unit + share >= cost[t];
      ranges.push_back({t, begin.block, last ? t + 1 : t, last ? 0 : position_in(t, int32_t(unit + share)).block});
    }
  return ranges;
}

TEST_F(Plan, OfADecodeStep) {
  std::minstd_rand random(1);
  const auto up_to = [&](int32_t n) { return int32_t(random() % (uint32_t(n) + 1)); };
  constexpr int32_t kLongest = (1 << 26) + kTileOverhead;  // 2^31 keys
  int rounded = 0, equal_shares = 0;
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE(i);
    const int32_t num_tiles = i % 3 == 0 ? kWarpTiles : 1 + up_to(i % 3 == 1 ? kWarpTiles - 1 : kInlineTiles - 1);
    const int32_t num_workers = 1 + up_to(300), longest = i % 4 ? 1 + up_to(100) : kLongest;
    std::vector<int32_t> cost(num_tiles, longest);
    std::vector<int64_t> begin{0};
    for (int32_t& c : cost) {
      if (i % 5 == 1) c = up_to(1) ? longest : 1 + up_to(3);  // full and streaming heads
      if (i % 5 > 1) c = 1 + up_to(longest - 1);
      begin.push_back(begin.back() + c);
    }
    const int32_t workers = sharing_workers(begin.back(), num_tiles, num_workers);
    const int64_t share = ceil_div_64(begin.back(), workers);
    const bool alike = std::count(cost.begin(), cost.end(), cost[0]) == num_tiles;
    std::vector<WorkRange> expected = cut_into_shares(cost, share);
    if (alike || int32_t(expected.size()) > workers) {
      // Tiles that are alike get equally many shares each, two at least, if none grows by more than a sixteenth.
      const int32_t each = workers / num_tiles;
      const int64_t even = begin.back() / workers;
      const bool equal = alike && even >= kLongShare && each > 1 && ceil_div_64(cost[0], each) <= even + even / 16;
      const int32_t sharing = equal ? each * num_tiles : workers;
      expected.clear();
      for (int32_t w = 0; w < sharing; ++w) expected.push_back(work_range(begin.data(), num_tiles, w, sharing));
      for (int32_t w = 0; equal && w < sharing; ++w) {
        ASSERT_EQ(expected[w].tile, w / each);
        ASSERT_EQ(expected[w].block, expected[w % each].block) << "every tile is cut at the same places";
      }
      equal_shares += equal && sharing < workers;
    } else {
      ++rounded;
    }
    const auto sharing = int32_t(expected.size());
    expected.resize(num_workers, {num_tiles, 0, num_tiles, 0});

    std::vector<Shared> shared(num_workers);
    std::vector<TilePieces> pieces(num_tiles);
    CUDA_OK(launch(share_kernel, dim3(num_workers), 32, 0, nullptr, false, cost.data(), num_tiles, shared.data(),
                   pieces.data()));
    std::vector<std::vector<int32_t>> slots(num_tiles);
    for (int32_t w = 0; w < num_workers; ++w) {
      for (const WorkRange& range : {shared[w].of_warp, shared[w].of_block}) {
        ASSERT_EQ(range.tile, expected[w].tile) << w;
        ASSERT_EQ(range.block, expected[w].block) << w;
        ASSERT_EQ(range.end_tile, expected[w].end_tile) << w;
        ASSERT_EQ(range.end_block, expected[w].end_block) << w;
      }
      for (int32_t t = expected[w].tile; w < sharing && t < tiles_end(expected[w]); ++t)
        slots[t].push_back(partial_slot(expected[w], w, t));
    }
    for (int32_t t = 0; t < num_tiles; ++t) {
      ASSERT_EQ(size_t(pieces[t].count), slots[t].size()) << t;
      for (int32_t p = 0; p < pieces[t].count; ++p) ASSERT_EQ(pieces[t].slot(p), slots[t][p]) << t;
    }
  }
  EXPECT_GT(rounded, 40);
  EXPECT_GT(equal_shares, 5);
  EXPECT_LT(rounded, 360);
}

__global__ void few_kernel(const int32_t* cost, int32_t num_tiles, WorkRange* ranges) {
  const int32_t lane = threadIdx.x, worker = blockIdx.x;
  const FewTiles few = line_up_few(lane < num_tiles ? cost[lane] : 1234, num_tiles, gridDim.x);
  const WorkRange range = few.range(num_tiles, worker);
  if (lane == 0) ranges[worker] = range;
}

__global__ void pieces_kernel(const WorkRange* ranges, int32_t num_workers, TilePieces* pieces) {
  const TilePieces found = pieces_of(ranges, 0, num_workers, blockIdx.x);
  if (threadIdx.x == 0) pieces[blockIdx.x] = found;
}

TEST_F(Plan, OfFewTiles) {
  std::minstd_rand random(2);
  const auto up_to = [&](int32_t n) { return int32_t(random() % (uint32_t(n) + 1)); };
  int whole = 0, aligned = 0, even = 0;
  for (int i = 0; i < 180; ++i) {
    SCOPED_TRACE(i);
    const int32_t num_tiles = i % 3 == 0 ? kWarpTiles : 1 + up_to(kWarpTiles - 1);
    const int32_t num_workers = i % 2 ? 132 : 1 + up_to(200);
    const int32_t longest = i % 8 == 7 ? (1 << 26) + kTileOverhead : 1 + up_to(i % 8 < 2 ? 12 : 300);
    std::vector<int32_t> cost(num_tiles, longest);
    for (int32_t& c : cost) {
      if (i % 5 == 1) c = up_to(1) ? longest : 1 + up_to(3);  // full and streaming heads
      if (i % 5 > 2) c = 1 + up_to(longest - 1);
    }
    int64_t total = 0;
    for (const int32_t c : cost) total += c;
    std::vector<WorkRange> expected;
    if (num_tiles <= num_workers && waves_end_in_time(num_tiles, largest(cost), total, num_workers)) {
      ++whole;
      for (int32_t t = 0; t < num_tiles; ++t) expected.push_back({t, 0, t + 1, 0});
    } else {
      expected = cut(cost, num_workers);
      bool parts_of_two = false;
      for (const WorkRange& r : expected) parts_of_two |= tiles_end(r) > r.tile + 1;
      ++(parts_of_two ? even : aligned);
    }
    const auto sharing = int32_t(expected.size());
    expected.resize(num_workers, {num_tiles, 0, num_tiles, 0});
    std::vector<WorkRange> ranges(num_workers);
    std::vector<TilePieces> pieces(num_tiles);
    CUDA_OK(launch(few_kernel, dim3(num_workers), 32, 0, nullptr, false, cost.data(), num_tiles, ranges.data()));
    CUDA_OK(launch(pieces_kernel, dim3(num_tiles), 32, 0, nullptr, false, ranges.data(), num_workers, pieces.data()));
    std::vector<std::vector<int32_t>> slots(num_tiles);
    for (int32_t w = 0; w < num_workers; ++w) {
      ASSERT_EQ(ranges[w].tile, expected[w].tile) << w;
      ASSERT_EQ(ranges[w].block, expected[w].block) << w;
      ASSERT_EQ(ranges[w].end_tile, expected[w].end_tile) << w;
      ASSERT_EQ(ranges[w].end_block, expected[w].end_block) << w;
      for (int32_t t = ranges[w].tile; w < sharing && t < tiles_end(ranges[w]); ++t)
        slots[t].push_back(partial_slot(ranges[w], w, t));
    }
    for (int32_t t = 0; t < num_tiles; ++t) {
      ASSERT_EQ(size_t(pieces[t].count), slots[t].size() > 1 ? slots[t].size() : 0) << t;
      for (int32_t p = 0; p < pieces[t].count; ++p) ASSERT_EQ(pieces[t].slot(p), slots[t][p]) << t;
    }
  }
  EXPECT_GT(whole, 10);
  EXPECT_GT(aligned, 30);
  EXPECT_GT(even, 10);
}
#endif

}  // namespace
}  // namespace flux::cuda
