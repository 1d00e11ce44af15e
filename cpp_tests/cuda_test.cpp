// The CUDA stages: the plan against a twin on the host made of the same functions of core/schedule.h, with equal bits;
// all others against double precision. Runs on a GPU, and, as simt_test, without one (see simt/cuda_runtime.h).
#include "cuda/cuda.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "attend_case.h"
#include "cpu/cpu.h"
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

// Apart, if shares that are little larger than even ones do; else evenly.
std::vector<WorkRange> cut(const std::vector<int32_t>& cost, int32_t num_workers) {
  const auto num_tiles = int32_t(cost.size());
  int64_t total = 0;
  for (const int32_t c : cost) total += c;
  const int32_t smallest = cost.empty() ? 0 : *std::min_element(cost.begin(), cost.end());
  const Cut<int64_t> cut = cut_apart<int64_t>(total, smallest, largest(cost), num_tiles,
                                              sharing_workers(total, num_tiles, num_workers), [&](int64_t share) {
                                                int64_t shares = 0;
                                                for (const int32_t c : cost) shares += ceil_div_64(c, share);
                                                return shares;
                                              });
  std::vector<int64_t> begin{0};
  for (const int32_t c : cost) begin.push_back(begin.back() + ceil_div_64(c, cut.unit) * cut.unit);
  std::vector<WorkRange> ranges;
  for (int32_t w = 0; w < cut.num_workers; ++w)
    ranges.push_back(work_range(begin.data(), num_tiles, w, cut.num_workers));
  return ranges;
}

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
    p.header = {num_tiles, int32_t(p.ranges.size()), 0, 0};
    return p;
  }
  p.header = {num_tiles, num_tiles, 1, 0};
  if (in_turn) {
    p.tiles.clear();
    for (int32_t i = tiles_each - 1; i >= 0; --i)
      for (int32_t n = 0; n < num_seq_heads(problem); ++n)
        p.tiles.push_back({n / problem.kv.num_heads, n % problem.kv.num_heads, i});
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
                        int32_t num_workers, uint32_t seed, bool equal_q = false) {
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
  p.routing.patterns[1] = {128, 512, up_to(200), 1};
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
  int rounded = 0;
  for (int i = 0; i < 180; ++i) {
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
      expected.clear();
      for (int32_t w = 0; w < workers; ++w) expected.push_back(work_range(begin.data(), num_tiles, w, workers));
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
  EXPECT_GT(rounded, 18);
  EXPECT_LT(rounded, 162);
}

__global__ void few_kernel(const int32_t* cost, int32_t num_tiles, WorkRange* ranges, TilePieces* pieces) {
  __shared__ int64_t begin[kWarpTiles + 1];
  const int32_t lane = threadIdx.x, worker = blockIdx.x;
  const FewTiles few = line_up_few(lane < num_tiles ? cost[lane] : 1234, num_tiles, gridDim.x);
  const WorkRange range = few.range(num_tiles, worker);
  if (lane == 0) ranges[worker] = range, begin[0] = 0;
  if (lane < num_tiles) begin[lane + 1] = few.end;
  __syncwarp();
  if (worker == 0 && lane < num_tiles) pieces[lane] = tile_pieces(begin, num_tiles, lane, few.workers);
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
    CUDA_OK(launch(few_kernel, dim3(num_workers), 32, 0, nullptr, false, cost.data(), num_tiles, ranges.data(),
                   pieces.data()));
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
      ASSERT_EQ(size_t(pieces[t].count), slots[t].size()) << t;
      for (int32_t p = 0; p < pieces[t].count; ++p) ASSERT_EQ(pieces[t].slot(p), slots[t][p]) << t;
    }
  }
  EXPECT_GT(whole, 10);
  EXPECT_GT(aligned, 30);
  EXPECT_GT(even, 10);
}
#endif

class OneWorker : public cpu::Executor {
 public:
  int num_workers() const override { return 1; }
  void run(int64_t n, const std::function<void(int64_t)>& body) const override {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
};

class Attend : public testing::TestWithParam<std::tuple<DType, test::Layout, bool>> {};

TEST_P(Attend, AgreesWithDoublePrecision) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  const auto [dtype, kind, decode] = GetParam();
  test::Random random(71 + 100 * int(dtype) + 10 * int(kind) + decode);
  for (int32_t dim : {64, 128, 96, 256, 40, 8, 64, 128, 64, 128}) {
    SCOPED_TRACE("head_dim " + std::to_string(dim));
    test::ProblemOptions o;
    o.max_batch = decode ? 6 : 2;
    o.max_kv_heads = 2;
    o.max_q_len = decode ? 3 : 150;
    o.max_kv_len = decode ? 700 : 250;
    if (decode && random.chance(40))
      o.max_batch = 80, o.max_kv_len = 60;  // mostly more tiles than a warp plans
    else if (!decode && random.chance(25))
      o.min_q_len = 100, o.max_kv_len = 20;  // tiles without keys
    else if (!decode && random.chance(50))
      o.max_batch = 1, o.min_q_len = 17, o.max_q_len = 30, o.max_kv_len = 2000;  // tiles that are cut
    test::AttendCase c;
    test::random_attend(random, dtype, kind, dim, 8, o, c);
    Queries& q = c.params.forward.q;
    if (q.total_rows == 0) continue;
    if (!decode && random.chance(50)) q.max_len = 1 << 18, q.total_rows = 1 << 20;  // bounds that call for large tiles
    const auto poison = c.out.bytes;
    attend_on_device(c);
    test::expect_attended(c, test::expected(c));
    if (HasFailure()) return;
    const auto first = c.out.bytes;
    c.out.bytes = poison;
    attend_on_device(c);
    EXPECT_EQ(c.out.bytes, first) << "the same call gives the same bits";
  }
}

std::string name_of(const testing::TestParamInfo<std::tuple<DType, test::Layout, bool>>& info) {
  const char* layouts[] = {"Batched", "Packed", "Paged", "PagedPerHead"};
  const auto [dtype, kind, decode] = info.param;
  return std::string(dtype == DType::kFloat16 ? "Float16" : "BFloat16") + layouts[int(kind)] +
         (decode ? "Decode" : "Prefill");
}
INSTANTIATE_TEST_SUITE_P(Cuda, Attend,
                         testing::Combine(testing::Values(DType::kFloat16, DType::kBFloat16),
                                          testing::Values(test::Layout::kBatched, test::Layout::kPacked,
                                                          test::Layout::kPaged, test::Layout::kPagedPerHead),
                                          testing::Bool()),
                         name_of);

// Devices to test on: without a GPU, those that the machine can pretend to be.
template <typename Test>
void on_every_device(Test test) {
#ifdef FLUX_SIMT
  for (const simt::DeviceModel& model : {simt::kHopper, simt::kAmpere}) {
    SCOPED_TRACE("capability " + std::to_string(model.capability));
    simt::device = model;
    test();
  }
#else
  test();
#endif
}

void route_on_device(test::RouteCase& c) {
  Copies copy;
  RouteParams p = c.params;
  p.x = copy(c.x);
  p.rows.begin = copy(c.begin), p.rows.end = copy(c.end);
  for (int l = 0; l < kRouterLayers; ++l) p.layers[l].weight = copy(c.weights[l]), p.layers[l].bias = copy(c.biases[l]);
  p.pooled = copy(c.pooled), p.logits = copy(c.logits), p.route = copy(c.route);
  CUDA_OK(route(p, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  c.pooled = to_host(p.pooled, c.pooled.size());
  c.logits = to_host(p.logits, c.logits.size());
  c.route = to_host(p.route, c.route.size());
}

TEST(Route, SmallAndOdd) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  on_every_device([] {
    test::Random random(91);
    for (int i = 0; i < 24; ++i) {
      SCOPED_TRACE("case " + std::to_string(i));
      test::RouteCase c;
      test::random_route(random, i % 4 == 3 ? 30 : 3, 6, 100, c);
      route_on_device(c);
      test::expect_routed(c, 1e-4);
    }
  });
}

// A LayerRouter of head dimension 128 as models have it; a HeadRouter for more decisions than clusters.
TEST(Route, RealSizes) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  on_every_device([] {
    test::Random random(92);
    for (const bool per_head : {false, true}) {
      SCOPED_TRACE(per_head ? "HeadRouter" : "LayerRouter");
      test::RouteCase c;
      RouteParams& p = c.params;
      p.dtype = p.weight_dtype = DType::kBFloat16;
      p.batch = per_head ? 20 : 2, p.num_heads = per_head ? 8 : 32, p.head_dim = 128;
      p.pool_size = per_head ? 10 : 100;
      p.per_head = per_head;
      const int32_t layer_widths[] = {1024, 256, 512, 128, 2}, head_widths[] = {512, 128, 256, 128, 2};
      test::fill_route(random, per_head ? 30 : 300, 8, per_head ? head_widths : layer_widths, c);
      route_on_device(c);
      test::expect_routed(c, 1e-4);
    }
  });
}

// One step after another on the device and on the CPU: equal bits.
TEST(Append, AgreesWithTheCpu) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  test::Random random(81);
  for (int i = 0; i < 12; ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    AppendParams p;
    p.batch = random.integer(1, 3), p.num_kv_heads = random.integer(1, 3), p.head_dim = 8 * random.integer(1, 20);
    p.page_size = 1 << random.integer(0, 4);
    p.max_cache_len = random.integer(20, 90);
    p.max_pages = ceil_div(p.max_cache_len, p.page_size);
    p.sink_pages = min_of(random.integer(0, 2), p.max_pages);
    p.pattern.align = 1 << random.integer(0, 3);
    p.pattern.window = p.pattern.align * random.integer(1, 3);
    p.unit = max_of(p.page_size, p.pattern.align);
    p.k_dtype = DType(random.integer(0, 2)), p.v_dtype = DType(random.integer(0, 2));
    p.pool_dtype = random.chance(50) ? p.k_dtype : DType(random.integer(0, 2));
    std::vector<int32_t> base, ring, seen;
    const int32_t window_pages = ceil_div(p.pattern.window + p.pattern.align + p.unit + 1, p.page_size) + 1;
    for (int32_t n = 0; n < p.num_seq_heads(); ++n) {
      const int32_t full = p.max_pages - p.sink_pages;
      base.push_back(p.num_pages);
      ring.push_back(max_of(random.chance(50) ? full : min_of(window_pages, full), 1));
      seen.push_back(random.integer(0, 10));
      p.num_pages += p.sink_pages + ring.back();
    }
    std::vector<int32_t> table(size_t(p.num_seq_heads()) * p.max_pages), kv_len(p.num_seq_heads());
    std::vector<int64_t> slots{7};
    std::vector<int32_t> active(p.batch, 1);
    const int32_t unit = random.chance(50) ? 8 : 1;
    test::Data k, v, k_pool, v_pool;
    k.allocate(p.k_dtype, test::layout(random, unit, false, p.batch, 1, p.num_kv_heads, p.head_dim, p.k_stride));
    v.allocate(p.v_dtype, test::layout(random, unit, false, p.batch, 1, p.num_kv_heads, p.head_dim, p.v_stride));
    for (test::Data* pool : {&k_pool, &v_pool})
      pool->allocate(p.pool_dtype, int64_t(p.num_pages) * p.page_size * p.head_dim);

    const auto pointed_at = [&](auto&& place) {
      AppendParams to = p;
      to.k_pool = place(k_pool), to.v_pool = place(v_pool);
      to.base = place(base), to.ring = place(ring), to.page_table = place(table), to.kv_len = place(kv_len);
      to.seen = place(seen), to.slots = place(slots);
      return to;
    };
    Copies copy;
    AppendParams there = pointed_at(copy);
    AppendParams here = pointed_at([](auto& x) {
      if constexpr (std::is_same_v<decltype(x), test::Data&>)
        return x.bytes.data();
      else
        return x.data();
    });
    for (int step = 0; step < p.max_cache_len; ++step) {  // the last ones find no place
      for (test::Data* x : {&k, &v})
        for (int64_t n = 0; n < x->size(); ++n) x->set(n, random.normal());
      Copies token;
      there.k = token(k), there.v = token(v);
      here.k = k.bytes.data(), here.v = v.bytes.data();
      if (i % 2) {  // sequences without a token in this step, and such that get NaN
        for (int32_t& a : active) a = random.integer(-1, 1);
        there.active = token(active), here.active = active.data();
      }
      CUDA_OK(append(there, nullptr));
      cpu::append(here, OneWorker());
      CUDA_OK(cudaDeviceSynchronize());
      ASSERT_EQ(to_host(static_cast<unsigned char*>(there.k_pool), k_pool.bytes.size()), k_pool.bytes);
      ASSERT_EQ(to_host(static_cast<unsigned char*>(there.v_pool), v_pool.bytes.size()), v_pool.bytes);
      ASSERT_EQ(to_host(there.page_table, table.size()), table) << "step " << step;
      ASSERT_EQ(to_host(there.kv_len, kv_len.size()), kv_len);
      ASSERT_EQ(to_host(there.seen, seen.size()), seen);
      ASSERT_EQ(to_host(there.slots, 1), slots);
    }
  }
}

}  // namespace
}  // namespace flux::cuda
