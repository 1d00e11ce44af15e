// The plan stage on the device against a twin on the host made of the same functions of core/schedule.h: equal bits.
#include "cuda/cuda.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace flux::cuda {
namespace {

#define CUDA_OK(call) ASSERT_EQ(call, cudaSuccess)

struct HostPlan {
  PlanHeader header{};
  std::vector<Tile> tiles;
  std::vector<WorkRange> ranges;
};

HostPlan plan_on_host(const ProblemShape& s, const TileShape& tile, int32_t num_workers) {
  HostPlan p;
  std::vector<int64_t> cost{0}, row_cost(num_rows(s), 0);
  int32_t longest = 0;
  const auto add_row = [&](int32_t row) {
    const int32_t b = row / s.num_kv_heads, h = row % s.num_kv_heads;
    for (int32_t m = tiles_in_row(s, tile, b, h) - 1; m >= 0; --m) p.tiles.push_back({b, h, m});
  };
  for (int32_t row = 0; row < num_rows(s); ++row) add_row(row);
  for (const Tile& t : p.tiles) {
    const int32_t c = tile_cost(view_tile(s, tile, t));
    cost.push_back(cost.back() + c);
    row_cost[t.seq * s.num_kv_heads + t.kv_head] += c;
    longest = std::max(longest, c);
  }
  const auto num_tiles = int32_t(p.tiles.size());
  const bool whole = hand_out_whole(cost.back(), longest, num_workers);
  const int32_t sharing = sharing_workers(cost.back(), num_workers);
  p.header = {num_tiles, whole ? num_tiles : sharing, whole, num_workers};
  if (!whole) {
    for (int32_t w = 0; w < sharing; ++w) p.ranges.push_back(work_range(cost.data(), num_tiles, w, sharing));
    return p;
  }
  std::vector<int32_t> order(num_rows(s));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row_cost[a] > row_cost[b]; });
  p.tiles.clear();
  for (int32_t row : order) add_row(row);
  return p;
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) {
    EXPECT_EQ(cudaMalloc(&data_, std::max<size_t>(host.size(), 1) * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

template <typename T>
std::vector<T> to_host(const T* device, size_t count) {
  std::vector<T> host(count);
  EXPECT_EQ(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return host;
}

void expect_equal_plans(int32_t batch, int32_t kv_heads, int32_t max_q, int32_t max_kv, TileShape tile,
                        int32_t num_workers, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << "batch " << batch << ", heads " << kv_heads << ", q " << max_q << ", kv " << max_kv
                                  << ", workers " << num_workers << ", seed " << seed);
  std::mt19937 random(seed);
  const auto up_to = [&](int32_t n) { return int32_t(random() % uint32_t(n + 1)); };
  std::vector<int32_t> q_end(batch), kv_end(batch), route(size_t(batch) * kv_heads);
  for (int32_t b = 0; b < batch; ++b) q_end[b] = up_to(max_q), kv_end[b] = up_to(max_kv);
  for (int32_t& r : route) r = up_to(1);
  ProblemShape s;
  s.batch = batch;
  s.num_kv_heads = kv_heads;
  s.num_q_heads = 4 * kv_heads;
  s.head_dim = 128;
  s.max_q_len = s.q_rows.capacity = max_q;
  s.kv_rows.capacity = max_kv;
  s.total_q_rows = int64_t(batch) * max_q;
  s.route_stride_b = kv_heads;
  s.route_stride_h = 1;
  s.patterns[1] = {128, 512, up_to(200), 1};
  ProblemShape on_host = s;
  on_host.q_rows.end = q_end.data();
  on_host.kv_rows.end = kv_end.data();
  on_host.route = route.data();
  const DeviceArray<int32_t> d_q(q_end), d_kv(kv_end), d_route(route);
  s.q_rows.end = d_q.get();
  s.kv_rows.end = d_kv.get();
  s.route = d_route.get();

  AttendConfig c;
  c.tile = tile;
  c.tile_rows = 16;
  c.num_workers = num_workers;
  const DeviceArray<char> memory(std::vector<char>(lay_out(s, c, nullptr).bytes, char(0xff)));
  const Workspace w = lay_out(s, c, memory.get());
  for (int repeat = 0; repeat < 2; ++repeat) CUDA_OK(plan(s, c, w.plan, nullptr));
  CUDA_OK(cudaDeviceSynchronize());

  const HostPlan expected = plan_on_host(on_host, tile, num_workers);
  const PlanHeader header = to_host(w.plan.header, 1)[0];
  EXPECT_EQ(header.num_tiles, expected.header.num_tiles);
  EXPECT_EQ(header.num_items, expected.header.num_items);
  EXPECT_EQ(header.whole_tiles, expected.header.whole_tiles);
  EXPECT_EQ(header.next_item, num_workers);
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
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};

TEST_F(Plan, Decode) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    expect_equal_plans(1, 8, 1, 100000, {4, 64}, 264, seed);
    expect_equal_plans(64, 8, 1, 40000, {4, 64}, 264, seed);
    expect_equal_plans(300, 8, 1, 3000, {4, 64}, 264, seed);  // more rows than shared memory holds
    expect_equal_plans(1500, 2, 1, 64, {4, 64}, 16, seed);
  }
}

TEST_F(Plan, Prefill) {
  for (uint32_t seed = 0; seed < 5; ++seed) {
    expect_equal_plans(1, 1, 5, 5, {32, 64}, 132, seed);
    expect_equal_plans(3, 4, 2000, 3000, {32, 64}, 132, seed);
    expect_equal_plans(8, 8, 20000, 20000, {32, 128}, 132, seed);  // whole tiles, sorted rows
    expect_equal_plans(200, 8, 300, 3000, {32, 64}, 132, seed);
  }
}

}  // namespace
}  // namespace flux::cuda
