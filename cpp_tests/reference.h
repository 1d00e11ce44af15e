// The slow, obvious twins of the CPU stages: double precision, one (query, key) pair after the other, straight from
// `visible`. They take the same parameter structs.
#pragma once

#include <cmath>
#include <vector>

#include "core/params.h"
#include "core/pattern.h"
#include "cpu/element.h"

namespace flux::test {

inline double read(DType dtype, const void* base, int64_t i) {
  double value = 0;
  cpu::dispatch(dtype, [&](auto* t) { value = cpu::to_float(static_cast<decltype(t)>(const_cast<void*>(base))[i]); });
  return value;
}
inline void write(DType dtype, void* base, int64_t i, double value) {
  cpu::dispatch(dtype, [&](auto* t) { cpu::from_float(float(value), static_cast<decltype(t)>(base)[i]); });
}

inline int64_t at(const Strides& s, int64_t b, int64_t row, int64_t head) { return b * s.b + row * s.s + head * s.h; }

// Where key `pos` of a sequence stands in k or v.
inline int64_t kv_at(const AttendParams& p, const Strides& s, int32_t b, int32_t h, int32_t pos) {
  const int32_t row = p.kv.rows(b, h).begin + pos;
  if (!p.kv.page_table) return at(s, b, row, h);
  const int32_t page = p.kv.page_table[b * p.kv.page_stride_b + h * p.kv.page_stride_h + row / p.kv.page_size];
  return at(s, page, row % p.kv.page_size, p.kv.pages_per_head ? 0 : h);
}

struct Expected {
  std::vector<double> out, lse, grad_q, grad_k, grad_v;  // laid out as the tensors they are compared with
};

// f(sequence, KV head, query head, row of q, position, keys it sees)
template <typename F>
void for_each_query(const AttendParams& p, F&& f) {
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t g = 0; g < p.q.num_heads; ++g) {
      const int32_t h = g / p.group(), mode = p.routing.mode(b, h);
      const Span q = p.q.rows(b, h), kv = p.kv.rows(b, h);
      for (int32_t i = 0; i < q.size(); ++i) {
        const int32_t pos = kv.size() - q.size() + i;
        const BlockList list = p.routing.blocks[mode](b, h, p.kv.num_heads, i);
        std::vector<int32_t> keys;
        for (int32_t j = 0; j < kv.size(); ++j)
          if (visible(p.routing.patterns[mode], pos, j, kv.size(), list)) keys.push_back(j);
        f(b, h, g, q.begin + i, keys);
      }
    }
}

// Sizes: elements of q (and out), of lse, of k (and v). grad_out null: no gradients.
inline Expected attend(const AttendBackwardParams& b, size_t q_size, size_t lse_size, size_t kv_size) {
  const AttendParams& p = b.forward;
  const int32_t dim = p.head_dim;
  Expected e{std::vector<double>(q_size), std::vector<double>(lse_size, -INFINITY), std::vector<double>(q_size),
             std::vector<double>(kv_size), std::vector<double>(kv_size)};
  for_each_query(p, [&](int32_t seq, int32_t h, int32_t g, int32_t row, const std::vector<int32_t>& keys) {
    const int64_t q = at(p.q.stride, seq, row, g), out = at(p.out.stride, seq, row, g);
    std::vector<double> prob(keys.size());
    double max = -INFINITY, sum = 0;
    for (size_t n = 0; n < keys.size(); ++n) {
      const int64_t k = kv_at(p, p.kv.k.stride, seq, h, keys[n]);
      for (int32_t d = 0; d < dim; ++d) prob[n] += read(p.dtype, p.q.data, q + d) * read(p.dtype, p.kv.k.data, k + d);
      prob[n] *= p.scale;
      max = std::max(max, prob[n]);
    }
    for (double& x : prob) sum += x = std::exp(x - max);
    e.lse[at(p.lse_stride, seq, row, g)] = keys.empty() ? -INFINITY : max + std::log(sum);
    for (size_t n = 0; n < keys.size(); ++n) {
      prob[n] /= sum;
      const int64_t v = kv_at(p, p.kv.v.stride, seq, h, keys[n]);
      for (int32_t d = 0; d < dim; ++d) e.out[out + d] += prob[n] * read(p.dtype, p.kv.v.data, v + d);
    }
    if (!b.grad_out.data) return;
    const int64_t go = at(b.grad_out.stride, seq, row, g), gq = at(b.grad_q.stride, seq, row, g);
    double delta = 0;
    for (int32_t d = 0; d < dim; ++d) delta += read(p.dtype, b.grad_out.data, go + d) * e.out[out + d];
    for (size_t n = 0; n < keys.size(); ++n) {
      const int64_t k = kv_at(p, p.kv.k.stride, seq, h, keys[n]), v = kv_at(p, p.kv.v.stride, seq, h, keys[n]);
      const int64_t gk = kv_at(p, b.grad_k.stride, seq, h, keys[n]), gv = kv_at(p, b.grad_v.stride, seq, h, keys[n]);
      double dp = 0;
      for (int32_t d = 0; d < dim; ++d)
        dp += read(p.dtype, b.grad_out.data, go + d) * read(p.dtype, p.kv.v.data, v + d);
      const double ds = prob[n] * (dp - delta) * p.scale;
      for (int32_t d = 0; d < dim; ++d) {
        e.grad_q[gq + d] += ds * read(p.dtype, p.kv.k.data, k + d);
        e.grad_k[gk + d] += ds * read(p.dtype, p.q.data, q + d);
        e.grad_v[gv + d] += prob[n] * read(p.dtype, b.grad_out.data, go + d);
      }
    }
  });
  return e;
}

// Logits [decisions, 2].
inline std::vector<double> route_logits(const RouteParams& p) {
  const int32_t decisions = p.per_head ? p.num_heads : 1;
  std::vector<double> logits;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t i = 0; i < decisions; ++i) {
      const Span rows = p.rows(b, 0);
      std::vector<int32_t> pooled_rows;
      for (int32_t r = rows.begin; r < min_of(rows.begin + p.pool_size, rows.end); ++r) pooled_rows.push_back(r);
      for (int32_t r = max_of(rows.end - p.pool_size, rows.begin); r < rows.end; ++r) pooled_rows.push_back(r);
      std::vector<double> x(p.head_dim);
      double terms = 0;
      for (int32_t r : pooled_rows)
        for (int32_t h = p.per_head ? i : 0; h < (p.per_head ? i + 1 : p.num_heads); ++h, ++terms)
          for (int32_t d = 0; d < p.head_dim; ++d) x[d] += read(p.dtype, p.x, at(p.x_stride, b, r, h) + d);
      for (double& value : x) value = terms ? value / terms : 0;
      for (int layer = 0; layer < kRouterLayers; ++layer) {
        const Linear& l = p.layers[layer];
        std::vector<double> y(l.out);
        for (int32_t o = 0; o < l.out; ++o) {
          y[o] = read(p.weight_dtype, l.bias, o);
          for (int32_t n = 0; n < l.in; ++n) y[o] += read(p.weight_dtype, l.weight, int64_t(o) * l.in + n) * x[n];
          if (layer != kEncoderLayers - 1 && layer != kRouterLayers - 1) y[o] /= 1 + std::exp(-y[o]);
        }
        x = y;
      }
      logits.insert(logits.end(), {x[0], x[1]});
    }
  return logits;
}

}  // namespace flux::test
