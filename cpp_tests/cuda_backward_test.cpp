// The gradients on CUDA against double precision. Part of cuda_test.
#include "device_case.h"

namespace flux::cuda {
namespace {

// The gradients, after the forward pass. What is not written is NaN.
void attend_backward_on_device(test::AttendCase& c) {
  Copies copy;
  AttendBackwardParams b = c.params;
  b.forward = to_device(c, copy);
  for (test::Data* grad : {&c.grad_q, &c.grad_k, &c.grad_v}) grad->fill(NAN);
  b.grad_out.data = copy(c.grad_out);
  b.grad_q.data = copy(c.grad_q), b.grad_k.data = copy(c.grad_k), b.grad_v.data = copy(c.grad_v);
  const DeviceArray<char> memory(std::vector<char>(lay_out(b, adds_in_order(b), nullptr).bytes, char(0xff)));
  const Status done = attend_backward(b, memory.get(), nullptr);
  ASSERT_TRUE(done.ok()) << done.what;
  CUDA_OK(cudaDeviceSynchronize());
  const auto bring_back = [](test::Data& grad, const void* from) {
    grad.bytes = to_host(static_cast<const unsigned char*>(from), grad.bytes.size());
  };
  bring_back(c.grad_q, b.grad_q.data), bring_back(c.grad_k, b.grad_k.data), bring_back(c.grad_v, b.grad_v.data);
}

int64_t count_written(const test::Data& x) {
  int64_t written = 0;
  for (int64_t i = 0; i < x.size(); ++i) written += !std::isnan(x[i]);
  return written;
}

class AttendBackward : public testing::TestWithParam<std::tuple<DType, test::Layout>> {};

TEST_P(AttendBackward, AgreesWithDoublePrecision) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU";
  const auto [dtype, kind] = GetParam();
  test::Random random(171 + 100 * int(dtype) + 10 * int(kind));
  for (int i = 0; i < int(std::size(test::kGradientDims)); ++i) {
    const int32_t dim = test::kGradientDims[i];
    SCOPED_TRACE("case " + std::to_string(i) + ", head_dim " + std::to_string(dim));
    const test::ProblemOptions o = test::gradient_options(i);
    test::AttendCase c;
    test::random_attend(random, dtype, kind, dim, 8, o, c);
    const AttendParams& p = c.params.forward;
    if (p.q.total_rows == 0) continue;
    attend_on_device(c);
    attend_backward_on_device(c);
    if (HasFailure()) return;
    int64_t rows = 0, keys = 0;
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < p.kv.num_heads; ++h)
        rows += p.q.rows(b, h).size() * p.group(), keys += p.kv.rows(b, h).size();
    EXPECT_EQ(count_written(c.grad_q), rows * dim) << "rows of no sequence must stay untouched";
    EXPECT_EQ(count_written(c.grad_k), keys * dim);
    EXPECT_EQ(count_written(c.grad_v), keys * dim);
    test::expect_gradients(c, test::expected(c));
    if (HasFailure()) return;
    const auto grad_q = c.grad_q.bytes, grad_k = c.grad_k.bytes, grad_v = c.grad_v.bytes;
    attend_backward_on_device(c);
    EXPECT_TRUE(c.grad_q.bytes == grad_q && c.grad_k.bytes == grad_k && c.grad_v.bytes == grad_v)
        << "the same call gives the same bits";
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, AttendBackward,
                         testing::Combine(testing::Values(DType::kFloat16, DType::kBFloat16),
                                          testing::Values(test::Layout::kBatched, test::Layout::kPacked)),
                         [](const testing::TestParamInfo<std::tuple<DType, test::Layout>>& info) {
                           return std::string(std::get<0>(info.param) == DType::kFloat16 ? "Float16" : "BFloat16") +
                                  (std::get<1>(info.param) == test::Layout::kPacked ? "Packed" : "Batched");
                         });

}  // namespace
}  // namespace flux::cuda
