// Block selection on CUDA against its definition. Runs on a GPU, and, in simt_test, without one.
#include "cuda/cuda.h"
#include "on_device.h"
#include "select_case.h"

namespace flux::cuda {
namespace {

using test::Layout;

void select_on_device(test::SelectCase& c, const SelectInstance* instance) {
  test::Copies copy;
  SelectParams p = c.params;
  const test::Problem& host = c.attend.problem;
  p.q.data = copy(c.attend.q), p.kv.k.data = copy(c.attend.k);
  if (p.kv.page_table) p.kv.page_table = copy(c.attend.page_table);
  p.q.rows.begin = copy(host.q_begin), p.q.rows.end = copy(host.q_end);
  p.kv.rows.begin = copy(host.kv_begin), p.kv.rows.end = copy(host.kv_end);
  if (p.routing.route) p.routing.route = copy(host.route);
  p.blocks = copy(c.blocks), p.counts = copy(c.counts);
  SelectConfig config;
  config.instance = instance;
  const Status chosen = configure(p, &config);
  ASSERT_TRUE(chosen.ok()) << chosen.what;
  const test::DeviceArray<char> memory(std::vector<char>(config.bytes, char(0xff)));
  const Status done = select(p, config, memory.get(), nullptr);
  ASSERT_TRUE(done.ok()) << done.what;
  CUDA_OK(cudaDeviceSynchronize());
  c.blocks = test::to_host(p.blocks, c.blocks.size());
  c.counts = test::to_host(p.counts, c.counts.size());
}

class Select : public testing::TestWithParam<std::tuple<DType, Layout>> {};

TEST_P(Select, KeepsTheFewestBlocks) {
  if (!test::has_gpu()) GTEST_SKIP() << "no GPU";
  const auto [dtype, kind] = GetParam();
  test::Random random(301 + 10 * int(dtype) + int(kind));
  for (int32_t dim : {64, 128, 8, 40, 72, 64, 128, 64}) {
    SCOPED_TRACE("head_dim " + std::to_string(dim));
    test::ProblemOptions o;
    o.max_batch = 2;
    o.max_kv_heads = 2;
    o.max_group = random.chance(30) ? 20 : 6;
    o.max_q_len = 280;
    o.max_kv_len = random.chance(30) ? 2500 : 400;
    test::SelectCase c;
    test::random_select(random, dtype, kind, dim, 8, o, c);
    if (c.counts.empty()) continue;
    for (int i = 0; const SelectInstance* instance = select_instance(c.params, i); ++i) {
      SCOPED_TRACE("kernel " + std::to_string(i));
      std::fill(c.blocks.begin(), c.blocks.end(), -7);
      select_on_device(c, instance);
      test::expect_selected(c);
      if (HasFailure()) return;
    }
  }
}

std::string name_of(const testing::TestParamInfo<std::tuple<DType, Layout>>& info) {
  const char* layouts[] = {"Batched", "Packed", "Paged", "PagedPerHead"};
  return (std::get<0>(info.param) == DType::kFloat16 ? "Float16" : "BFloat16") +
         std::string(layouts[int(std::get<1>(info.param))]);
}
INSTANTIATE_TEST_SUITE_P(Cuda, Select,
                         testing::Combine(testing::Values(DType::kFloat16, DType::kBFloat16),
                                          testing::Values(Layout::kBatched, Layout::kPacked, Layout::kPaged,
                                                          Layout::kPagedPerHead)),
                         name_of);

}  // namespace
}  // namespace flux::cuda
