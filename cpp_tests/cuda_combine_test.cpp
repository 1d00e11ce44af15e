// The combine stage on CUDA against sums on the host, for plans of both kinds. Runs on a GPU, and, as simt_test,
// without one (see simt/cuda_runtime.h).
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cuda/addresses.h"
#include "cuda/cuda.h"
#include "device_case.h"
#include "reference.h"

namespace flux::cuda {
namespace {

struct CombineCase {
  DType dtype;
  int32_t head_dim, heads, group, max_len, kv_len, tile_rows, kv_block, num_workers;
  bool few;  // planned by the workers of a prefill kernel
};

// Every row of a cut tile is the union of its pieces, which here are random; rows of whole tiles are not touched.
void run(const CombineCase& x, uint32_t seed) {
  std::minstd_rand random(seed);
  const auto up_to = [&](int32_t n) { return int32_t(random() % (uint32_t(n) + 1)); };
  const auto uniform = [&] { return float(up_to(2000)) / 1000.f - 1.f; };
  const int32_t batch = 2, q_heads = x.heads * x.group;
  std::vector<int32_t> q_end(batch), kv_end(batch);
  for (int32_t b = 0; b < batch; ++b) {
    q_end[b] = b == 0 ? x.max_len : 1 + up_to(x.max_len - 1);
    kv_end[b] = b == 0 ? x.kv_len : 1 + up_to(x.kv_len - 1);
  }
  AttendParams p;
  p.batch = batch, p.head_dim = x.head_dim, p.dtype = x.dtype;
  p.q.num_heads = q_heads, p.kv.num_heads = x.heads;
  p.q.rows.capacity = p.q.max_len = x.max_len, p.q.total_rows = batch * x.max_len;
  p.kv.rows.capacity = x.kv_len;
  p.out.stride = {int64_t(x.max_len) * q_heads * x.head_dim, q_heads * x.head_dim, x.head_dim};
  p.lse_stride = {int64_t(q_heads) * x.max_len, 1, x.max_len};
  const int64_t rows = int64_t(batch) * q_heads * x.max_len;
  const test::DeviceArray<int32_t> q_ends(q_end), kv_ends(kv_end);
  const test::DeviceArray<uint16_t> out(std::vector<uint16_t>(rows * x.head_dim, 0x1234));
  const test::DeviceArray<float> lse(std::vector<float>(rows, 123.f));
  p.out.data = out.get(), p.lse = lse.get();

  const Instance instance{90, x.dtype, x.head_dim, x.tile_rows, x.kv_block, nullptr};
  AttendConfig c;
  c.instance = &instance;
  c.tile = {x.tile_rows / x.group, x.kv_block};
  c.num_workers = x.num_workers;
  c.inline_plan = x.few;
  AttendParams host = p;
  host.q.rows.end = q_end.data(), host.kv.rows.end = kv_end.data();
  p.q.rows.end = q_ends.get(), p.kv.rows.end = kv_ends.get();

  std::vector<Tile> tiles;
  for (int32_t n = 0; n < num_seq_heads(p); ++n) {
    const int32_t seq = n / x.heads, head = n % x.heads;
    const int32_t count = x.few ? tiles_each(p, c.tile) : tiles_in_seq_head(host, c.tile, seq, head);
    for (int32_t i = 0; i < count; ++i) tiles.push_back({seq, head, count - 1 - i});
  }
  const auto num_tiles = int32_t(tiles.size());
  std::vector<TileView> views;
  std::vector<int64_t> cost{0};
  for (const Tile& t : tiles) {
    views.push_back(view_tile(host, c.tile, t));
    views.back().q_rows.end = max_of(views.back().q_rows.end, views.back().q_rows.begin);
    cost.push_back(cost.back() + tile_cost(views.back()));
  }
  const auto sharing = int32_t(min_of(cost.back() / 2, int64_t(x.num_workers)));
  std::vector<WorkRange> ranges(x.num_workers, {num_tiles, 0, num_tiles, 0});
  for (int32_t w = 0; w < sharing; ++w) ranges[w] = work_range(cost.data(), num_tiles, w, sharing);

  Workspace w = lay_out(p, c, nullptr);
  const test::DeviceArray<char> memory(std::vector<char>(w.bytes, char(0xff)));
  w = lay_out(p, c, memory.get());
  std::vector<float> outs(2 * int64_t(x.num_workers) * x.tile_rows * x.head_dim, NAN);
  std::vector<SoftmaxState> states(2 * int64_t(x.num_workers) * x.tile_rows);
  for (SoftmaxState& s : states) s.max = s.sum = NAN;
  std::vector<std::vector<int32_t>> slots(num_tiles);
  for (int32_t i = 0; i < sharing; ++i)
    for (int32_t t = ranges[i].tile; t < tiles_end(ranges[i]); ++t) {
      const TileSpan span = tile_span(ranges[i], t, views[t].blocks.size());
      if (!span.split || span.begin >= span.end) continue;
      const int32_t slot = partial_slot(ranges[i], i, t);
      slots[t].push_back(slot);
      for (int32_t row = 0; row < valid_rows(p, views[t]); ++row) {
        SoftmaxState& s = states[int64_t(slot) * x.tile_rows + row];
        s = up_to(3) ? SoftmaxState{40.f * uniform(), 1.f + uniform() / 2} : SoftmaxState{};
        for (int32_t d = 0; d < x.head_dim; ++d)
          outs[(int64_t(slot) * x.tile_rows + row) * x.head_dim + d] = s.empty() ? 0.f : uniform();
      }
    }
  const PlanHeader header{num_tiles, sharing, 0, 0};
  const auto put = [](auto* to, const auto& from) {
    CUDA_OK(cudaMemcpy(to, from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice));
  };
  put(w.plan.ranges, ranges), put(w.partials.out, outs), put(w.partials.state, states);
  if (!x.few) put(w.plan.tiles, tiles), put(w.plan.header, std::vector<PlanHeader>{header});
  CUDA_OK(combine(p, c, w, nullptr));
  CUDA_OK(cudaDeviceSynchronize());

  const std::vector<uint16_t> got = test::to_host(out.get(), rows * x.head_dim);
  const std::vector<float> got_lse = test::to_host(lse.get(), rows);
  std::vector<bool> written(rows);
  for (int32_t t = 0; t < num_tiles; ++t) {
    if (slots[t].empty()) continue;
    ASSERT_GT(slots[t].size(), 1u);
    for (int32_t row = 0; row < valid_rows(p, views[t]); ++row) {
      const TileRow at = tile_row(p, views[t], row);
      const int64_t n = row_offset(p.lse_stride, views[t], at);
      written[n] = true;
      double largest = -INFINITY, sum = 0;
      for (const int32_t slot : slots[t])
        largest = std::max(largest, double(states[int64_t(slot) * x.tile_rows + row].max));
      std::vector<double> expected(x.head_dim);
      for (const int32_t slot : slots[t]) {
        const SoftmaxState& s = states[int64_t(slot) * x.tile_rows + row];
        if (s.empty()) continue;
        const double factor = std::exp2(s.max - largest);
        sum += s.sum * factor;
        for (int32_t d = 0; d < x.head_dim; ++d)
          expected[d] += factor * outs[(int64_t(slot) * x.tile_rows + row) * x.head_dim + d];
      }
      const double expected_lse = sum > 0 ? (largest + std::log2(sum)) * kLn2 : -INFINITY;
      if (sum > 0)
        ASSERT_NEAR(got_lse[n], expected_lse, 1e-4) << t << ' ' << row;
      else
        ASSERT_EQ(got_lse[n], -INFINITY) << t << ' ' << row;
      for (int32_t d = 0; d < x.head_dim; ++d) {
        const double value = test::read(x.dtype, got.data(), row_offset(p.out.stride, views[t], at) + d);
        if (!views[t].sees_any(at.token))
          ASSERT_EQ(value, 0.);
        else if (sum > 0)
          ASSERT_NEAR(value, expected[d] / sum, 0.01) << t << ' ' << row << ' ' << d;
        else
          ASSERT_TRUE(std::isnan(value));
      }
    }
  }
  for (int64_t n = 0; n < rows; ++n) ASSERT_TRUE(written[n] || got_lse[n] == 123.f);
}

TEST(Combine, RandomPlans) {
  if (!test::has_gpu()) GTEST_SKIP() << "no GPU";
  std::minstd_rand random(7);
  const auto pick = [&](std::initializer_list<int32_t> of) { return of.begin()[random() % of.size()]; };
  for (uint32_t i = 0; i < 60; ++i) {
    SCOPED_TRACE(i);
    CombineCase x;
    x.dtype = i % 2 ? DType::kFloat16 : DType::kBFloat16;
    x.head_dim = pick({8, 40, 64, 96, 128, 136, 256});
    x.heads = pick({1, 2, 3});
    x.group = pick({1, 4, 5});
    x.tile_rows = pick({64, 128, 192});
    x.kv_block = pick({64, 128});
    x.num_workers = pick({1, 5, 17, 30, 132});
    x.few = i % 3 != 0;
    const int32_t q_tokens = x.tile_rows / x.group;
    const int32_t most = x.few ? 32 / (2 * x.heads) : 8;
    x.max_len = 1 + int32_t(random() % uint32_t(q_tokens * pick({1, most})));
    x.kv_len = pick({100, 1000, 5000, 30000});
    run(x, i);
  }
}

}  // namespace
}  // namespace flux::cuda
