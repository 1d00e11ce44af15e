// Gradients of q, k and v. One job per (sequence, KV head), so that each row of grad_k and grad_v has one writer.
#include <cmath>
#include <vector>

#include "core/softmax_state.h"
#include "cpu/cpu.h"
#include "cpu/element.h"
#include "cpu/rows.h"

namespace flux::cpu {
namespace {

constexpr int32_t kQTokens = 16, kKvBlock = 64;

template <typename T>
void row_backward(const AttendBackwardParams& b, int32_t seq, int32_t kv_head) {
  const AttendParams& p = b.forward;
  const TileShape shape{kQTokens, kKvBlock};
  const int32_t group = p.shape.group(), dim = p.shape.head_dim;
  const Span kv = p.shape.kv_rows(seq, kv_head);
  std::vector<float> dk(size_t(kv.size()) * dim), dv(dk.size()), dq(dim);
  for (int32_t m = 0; m < tiles_in_row(p.shape, shape, seq, kv_head); ++m) {
    const TileView v = view_tile(p.shape, shape, {seq, kv_head, m});
    for (int32_t r = 0; r < v.q_rows.size() * group; ++r) {
      const int32_t row = v.q_rows.begin + r / group, head = kv_head * group + r % group;
      const T* q = q_row<T>(p, v.tile, row, head);
      const T* out = out_row<T>(p, v.tile, row, head);
      const T* dout = static_cast<const T*>(b.grad_out) + seq * b.grad_out_stride.b + row * b.grad_out_stride.s +
                      head * b.grad_out_stride.h;
      const float lse = lse_at(p, v.tile, row, head);
      float delta = 0.f;
      for (int32_t d = 0; d < dim; ++d) delta += to_float(out[d]) * to_float(dout[d]);
      std::fill(dq.begin(), dq.end(), 0.f);
      for (int32_t i = 0; i < v.blocks.size(); ++i) {
        const int32_t begin = v.blocks[i] * kKvBlock, end = min_of(begin + kKvBlock, kv.size());
        for (int32_t j = begin; j < end; ++j) {
          if (!v.sees(r / group, j)) continue;
          const T* k = kv_row<T>(p, p.k, p.k_stride, v, j);
          const T* value = kv_row<T>(p, p.v, p.v_stride, v, j);
          float score = 0.f, dp = 0.f;
          for (int32_t d = 0; d < dim; ++d) {
            score += to_float(q[d]) * to_float(k[d]);
            dp += to_float(dout[d]) * to_float(value[d]);
          }
          const float prob = std::exp(score * p.scale - lse), ds = prob * (dp - delta) * p.scale;
          for (int32_t d = 0; d < dim; ++d) {
            dq[d] += ds * to_float(k[d]);
            dk[size_t(j) * dim + d] += ds * to_float(q[d]);
            dv[size_t(j) * dim + d] += prob * to_float(dout[d]);
          }
        }
      }
      T* grad_q = static_cast<T*>(b.grad_q) + seq * b.grad_q_stride.b + row * b.grad_q_stride.s +
                  head * b.grad_q_stride.h;
      for (int32_t d = 0; d < dim; ++d) from_float(dq[d], grad_q[d]);
    }
  }
  for (int32_t j = 0; j < kv.size(); ++j) {
    const int64_t row = kv.begin + j;
    T* grad_k = static_cast<T*>(b.grad_k) + seq * b.grad_k_stride.b + row * b.grad_k_stride.s + kv_head * b.grad_k_stride.h;
    T* grad_v = static_cast<T*>(b.grad_v) + seq * b.grad_v_stride.b + row * b.grad_v_stride.s + kv_head * b.grad_v_stride.h;
    for (int32_t d = 0; d < dim; ++d) {
      from_float(dk[size_t(j) * dim + d], grad_k[d]);
      from_float(dv[size_t(j) * dim + d], grad_v[d]);
    }
  }
}

}  // namespace

void attend_backward(const AttendBackwardParams& p, const Executor& executor) {
  const ProblemShape& s = p.forward.shape;
  executor.run(int64_t(s.batch) * s.num_kv_heads, [&](int64_t i) {
    dispatch(p.forward.dtype, [&](auto* x) {
      row_backward<std::remove_pointer_t<decltype(x)>>(p, int32_t(i / s.num_kv_heads), int32_t(i % s.num_kv_heads));
    });
  });
}

}  // namespace flux::cpu
