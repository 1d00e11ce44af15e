// Stage 1: pool both ends of a prompt, two MLPs, decision.
#include <cmath>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/element.h"

namespace flux::cpu {
namespace {

// Mean over the first and last pool_size rows (overlap counts twice) of heads [head_begin, head_end).
template <typename T>
void pool(const RouteParams& p, int32_t b, int32_t head_begin, int32_t head_end, float* pooled) {
  const Span rows = p.rows(b, 0);
  const int32_t count = min_of(p.pool_size, rows.size());
  std::vector<double> sum(p.head_dim, 0.0);
  for (int32_t i = 0; i < 2 * count; ++i) {
    const int32_t row = i < count ? rows.begin + i : rows.end - 2 * count + i;
    for (int32_t h = head_begin; h < head_end; ++h) {
      const T* x = static_cast<const T*>(p.x) + b * p.x_stride.b + row * p.x_stride.s + h * p.x_stride.h;
      for (int32_t d = 0; d < p.head_dim; ++d) sum[d] += to_float(x[d]);
    }
  }
  const double terms = 2.0 * count * (head_end - head_begin);
  for (int32_t d = 0; d < p.head_dim; ++d) pooled[d] = count ? float(sum[d] / terms) : 0.f;
}

template <typename T>
std::vector<float> linear(const Linear& layer, const std::vector<float>& x) {
  std::vector<float> y(layer.out);
  for (int32_t o = 0; o < layer.out; ++o) {
    const T* w = static_cast<const T*>(layer.weight) + int64_t(o) * layer.in;
    float sum = to_float(static_cast<const T*>(layer.bias)[o]);
    for (int32_t i = 0; i < layer.in; ++i) sum += to_float(w[i]) * x[i];
    y[o] = sum;
  }
  return y;
}

template <typename T>
void score(const RouteParams& p, const float* pooled, float* logits) {
  std::vector<float> x(pooled, pooled + p.head_dim);
  for (int i = 0; i < kRouterLayers; ++i) {
    x = linear<T>(p.layers[i], x);
    if (i != kEncoderLayers - 1 && i != kRouterLayers - 1)
      for (float& v : x) v /= 1.f + std::exp(-v);
  }
  logits[0] = x[0];
  logits[1] = x[1];
}

}  // namespace

void route(const RouteParams& p, const Executor& executor) {
  const int32_t decisions = p.per_head ? p.num_heads : 1;
  executor.run(int64_t(p.batch) * decisions, [&](int64_t i) {
    const auto b = int32_t(i / decisions), h = int32_t(i % decisions);
    float* pooled = p.pooled + i * p.head_dim;
    float* logits = p.logits + 2 * i;
    dispatch(p.dtype, [&](auto* x) {
      pool<std::remove_pointer_t<decltype(x)>>(p, b, h, p.per_head ? h + 1 : p.num_heads, pooled);
    });
    dispatch(p.weight_dtype, [&](auto* w) { score<std::remove_pointer_t<decltype(w)>>(p, pooled, logits); });
    p.route[i] = decide_route(logits[0], logits[1]);
  });
}

}  // namespace flux::cpu
