// The CUDA stages against double precision (the plan: cuda_plan_test.cpp). Runs on a GPU, and, as simt_test, without
// one (see simt/cuda_runtime.h).
#include "cuda/cuda.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "attend_case.h"
#include "cpu/cpu.h"
#include "device_case.h"

namespace flux::cuda {
namespace {

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

// A long step with tiles that are alike and do not divide the workers: each is cut into equally many shares.
TEST(DecodeStep, LongTilesThatAreAlike) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
#ifdef FLUX_SIMT
  static constexpr simt::DeviceModel kElevenSms{2, 80, 80, 11, 2, 99 * 1024};
  struct Pretend {
    simt::DeviceModel before = std::exchange(simt::device, kElevenSms);
    ~Pretend() { simt::device = before; }
  } pretend;
  const int32_t heads = 7, kv_len = 7001;
#else
  const int32_t heads = 7, kv_len = 117001;  // long enough for 264 workers and for 396
#endif
  test::Random random(73);
  test::AttendCase c;
  AttendParams& p = c.problem.params;
  p.batch = 1, p.kv.num_heads = heads, p.q.num_heads = 3 * heads;
  p.q.max_len = p.q.rows.capacity = 2, p.q.total_rows = 2, p.kv.rows.capacity = kv_len;
  test::random_tensors(random, DType::kBFloat16, test::Layout::kBatched, 64, 8, c);
  AttendConfig config;
  ASSERT_TRUE(configure(c.params.forward, &config).ok());
  const int32_t cost = ceil_div(kv_len, config.tile.kv_block) + kTileOverhead, workers = config.num_workers;
  const int32_t sharing = workers_for_alike(cost, cost * heads / workers, heads, workers);
  EXPECT_LT(sharing, workers);
  EXPECT_EQ(sharing % heads, 0);
  attend_on_device(c);
  test::expect_attended(c, test::expected(c));
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
