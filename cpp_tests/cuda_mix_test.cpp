// Mixtures on CUDA in one walk over the keys, and their gradients, against double precision. Part of cuda_test.
#include "cuda/mix.h"
#include "device_case.h"

namespace flux::cuda {
namespace {

// A call of attention whose full pattern shows every key, and what a mixture has besides.
struct MixCase {
  test::AttendCase attend;
  test::Data sparse, mixed;
  std::vector<float> sparse_lse, weight, grad_weight;
};

void random_mix(test::Random& random, DType dtype, test::Layout kind, int32_t dim, const test::ProblemOptions& o,
                MixCase& c) {
  test::random_attend(random, dtype, kind, dim, 8, o, c.attend);
  AttendParams& p = c.attend.params.forward;
  p.routing.patterns[0] = {};
  p.routing.blocks[0] = {};
  c.sparse = c.mixed = c.attend.out;
  c.sparse_lse.assign(c.attend.lse.size(), NAN);
  for (int32_t i = 0; i < p.batch * p.kv.num_heads; ++i)
    c.weight.push_back(random.chance(20) ? float(random.integer(0, 1)) : float(random.integer(1, 99)) / 100.f);
  c.grad_weight.assign(c.weight.size(), NAN);
}

Mixture mixture_of(MixCase& c, test::Copies& copy) {
  const AttendParams& p = c.attend.params.forward;
  Mixture m;
  m.weight = copy(c.weight);
  m.stride_b = m.grad_stride_b = p.kv.num_heads;
  m.stride_h = m.grad_stride_h = 1;
  m.sparse_out = {copy(c.sparse), p.out.stride};
  m.mixed = {copy(c.mixed), p.out.stride};
  m.sparse_lse = copy(c.sparse_lse);
  m.grad_weight = copy(c.grad_weight);
  return m;
}

void bring_back(test::Data& to, const void* from) {
  to.bytes = to_host(static_cast<const unsigned char*>(from), to.bytes.size());
}

void mix_on_device(MixCase& c) {
  Copies copy;
  AttendParams p = to_device(c.attend, copy);
  p.routing = sparse_alone(p.routing);
  const Mixture m = mixture_of(c, copy);
  const DeviceArray<char> memory(std::vector<char>(kMixBytes, char(0xff)));
  const Status done = mix(p, m, memory.get(), nullptr);
  ASSERT_TRUE(done.ok()) << done.what;
  CUDA_OK(cudaDeviceSynchronize());
  bring_back(c.attend.out, p.out.data), bring_back(c.sparse, m.sparse_out.data), bring_back(c.mixed, m.mixed.data);
  c.attend.lse = to_host(p.lse, c.attend.lse.size());
  c.sparse_lse = to_host(m.sparse_lse, c.sparse_lse.size());
}

void mix_backward_on_device(MixCase& c) {
  Copies copy;
  MixBackwardParams b{c.attend.params, {}};
  b.forward = to_device(c.attend, copy);
  b.forward.routing = sparse_alone(b.forward.routing);
  b.mixture = mixture_of(c, copy);
  for (test::Data* grad : {&c.attend.grad_q, &c.attend.grad_k, &c.attend.grad_v}) grad->fill(NAN);
  b.grad_out.data = copy(c.attend.grad_out);
  b.grad_q.data = copy(c.attend.grad_q), b.grad_k.data = copy(c.attend.grad_k), b.grad_v.data = copy(c.attend.grad_v);
  const DeviceArray<char> memory(std::vector<char>(lay_out(b, can_add_in_order(b), nullptr).bytes, char(0xff)));
  const Status done = mix_backward(b, memory.get(), nullptr);
  ASSERT_TRUE(done.ok()) << done.what;
  CUDA_OK(cudaDeviceSynchronize());
  bring_back(c.attend.grad_q, b.grad_q.data);
  bring_back(c.attend.grad_k, b.grad_k.data), bring_back(c.attend.grad_v, b.grad_v.data);
  c.grad_weight = to_host(b.mixture.grad_weight, c.grad_weight.size());
}

// What hard routes give, all by one mode.
test::Expected expected_of(MixCase& c, int32_t mode) {
  std::fill(c.attend.problem.route.begin(), c.attend.problem.route.end(), mode);
  return test::expected(c.attend);
}

void expect_mixed(const MixCase& c, const test::Expected& full, const test::Expected& sparse) {
  const AttendParams& p = c.attend.params.forward;
  test::Difference mixed;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t g = 0; g < p.q.num_heads; ++g) {
      const double w = c.weight[b * p.kv.num_heads + g / p.group()];
      for (int32_t row = p.q.rows(b, g / p.group()).begin; row < p.q.rows(b, g / p.group()).end; ++row)
        for (int32_t d = 0; d < p.head_dim; ++d) {
          const int64_t i = test::at(p.out.stride, b, row, g) + d;
          mixed.add(c.mixed[i], (1 - w) * full.out[i] + w * sparse.out[i]);
        }
    }
  mixed.expect_small(p.dtype, 1, "mixed");
}

// Gradients are linear in the weight, of each KV head apart.
test::Expected mixed_gradients(const MixCase& c, const test::Expected& full, const test::Expected& sparse) {
  const AttendBackwardParams& b = c.attend.params;
  const AttendParams& p = b.forward;
  test::Expected e = full;
  const auto mix = [&](std::vector<double>& of, const std::vector<double>& other, int64_t at, double w) {
    for (int64_t i = at; i < at + p.head_dim; ++i) of[i] = (1 - w) * of[i] + w * other[i];
  };
  for (int32_t seq = 0; seq < p.batch; ++seq)
    for (int32_t h = 0; h < p.kv.num_heads; ++h) {
      const double w = c.weight[seq * p.kv.num_heads + h];
      for (int32_t g = h * p.group(); g < (h + 1) * p.group(); ++g)
        for (int32_t row = p.q.rows(seq, h).begin; row < p.q.rows(seq, h).end; ++row)
          mix(e.grad_q, sparse.grad_q, test::at(b.grad_q.stride, seq, row, g), w);
      for (int32_t j = 0; j < p.kv.rows(seq, h).size(); ++j) {
        mix(e.grad_k, sparse.grad_k, test::kv_at(p, b.grad_k.stride, seq, h, j), w);
        mix(e.grad_v, sparse.grad_v, test::kv_at(p, b.grad_v.stride, seq, h, j), w);
      }
    }
  return e;
}

void expect_gradient_of_weight(const MixCase& c) {
  const AttendBackwardParams& b = c.attend.params;
  const AttendParams& p = b.forward;
  for (int32_t seq = 0; seq < p.batch; ++seq)
    for (int32_t h = 0; h < p.kv.num_heads; ++h) {
      double want = 0, size = 0;
      for (int32_t g = h * p.group(); g < (h + 1) * p.group(); ++g)
        for (int32_t row = p.q.rows(seq, h).begin; row < p.q.rows(seq, h).end; ++row)
          for (int32_t d = 0; d < p.head_dim; ++d) {
            const int64_t i = test::at(p.out.stride, seq, row, g) + d;
            const double term =
                c.attend.grad_out[test::at(b.grad_out.stride, seq, row, g) + d] * (c.sparse[i] - c.attend.out[i]);
            want += term;
            size += std::abs(term);
          }
      EXPECT_NEAR(c.grad_weight[seq * p.kv.num_heads + h], want, 1e-5 * size);
    }
}

class Mix : public testing::TestWithParam<std::tuple<DType, test::Layout>> {};

TEST_P(Mix, AgreesWithDoublePrecision) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  const auto [dtype, kind] = GetParam();
  const bool paged = kind == test::Layout::kPaged || kind == test::Layout::kPagedPerHead;
  test::Random random(371 + 100 * int(dtype) + 10 * int(kind));
  for (int i = 0; i < (paged ? 4 : int(std::size(test::kGradientDims))); ++i) {  // of pages there are no gradients
    const int32_t dim = test::kGradientDims[i];
    SCOPED_TRACE("case " + std::to_string(i) + ", head_dim " + std::to_string(dim));
    const test::ProblemOptions o = test::gradient_options(i);
    MixCase c;
    random_mix(random, dtype, kind, dim, o, c);
    const AttendParams& p = c.attend.params.forward;
    if (p.q.total_rows == 0) continue;
    mix_on_device(c);
    if (HasFailure()) return;
    const test::Expected sparse = expected_of(c, 1);
    test::AttendCase by_sparse = c.attend;
    by_sparse.out = c.sparse, by_sparse.lse = c.sparse_lse;
    test::expect_attended(by_sparse, sparse);
    const test::Expected full = expected_of(c, 0);
    test::expect_attended(c.attend, full);
    expect_mixed(c, full, sparse);
    if (HasFailure()) return;
    if (paged) continue;
    mix_backward_on_device(c);
    if (HasFailure()) return;
    test::expect_gradients(c.attend, mixed_gradients(c, full, sparse));
    expect_gradient_of_weight(c);
    if (HasFailure()) return;
    const MixCase before = c;
    mix_backward_on_device(c);
    EXPECT_TRUE(c.attend.grad_q.bytes == before.attend.grad_q.bytes &&
                c.attend.grad_k.bytes == before.attend.grad_k.bytes &&
                c.attend.grad_v.bytes == before.attend.grad_v.bytes && c.grad_weight == before.grad_weight)
        << "the same call gives the same bits";
  }
}

std::string name_of(const testing::TestParamInfo<std::tuple<DType, test::Layout>>& info) {
  const char* const layouts[] = {"Batched", "Packed", "Paged", "PagedPerHead"};
  return std::string(std::get<0>(info.param) == DType::kFloat16 ? "Float16" : "BFloat16") +
         layouts[int(std::get<1>(info.param))];
}
INSTANTIATE_TEST_SUITE_P(Cuda, Mix,
                         testing::Combine(testing::Values(DType::kFloat16, DType::kBFloat16),
                                          testing::Values(test::Layout::kBatched, test::Layout::kPacked,
                                                          test::Layout::kPaged, test::Layout::kPagedPerHead)),
                         name_of);

}  // namespace
}  // namespace flux::cuda
