// The arguments of `select_blocks` to its parameter struct, checked. Shared by the CPU and the CUDA operator.
#pragma once

#include <tuple>
#include <vector>

#include "core/selection.h"
#include "torch/attend_args.h"

namespace flux::torch_ops {

struct SelectArgs {
  AttendArgs attend;  // k stands for v; patterns and lists are none
  double threshold, scale;
  int64_t stride, width, mode;
};

template <auto kOperator>
auto with_select_args(const Tensor& q, const Tensor& k, double threshold, int64_t stride, int64_t width, double scale,
                      OptionalTensor route, int64_t mode, OptionalTensor q_begin, OptionalTensor q_end,
                      OptionalTensor kv_begin, OptionalTensor kv_end, OptionalTensor page_table) {
  const OptionalTensor none;
  const std::vector<int64_t> no_patterns;
  return kOperator(SelectArgs{{q, k, k, near(route), no_patterns, none, none, none, none, scale, near(q_begin),
                               near(q_end), near(kv_begin), near(kv_end), page_table},
                              threshold,
                              scale,
                              stride,
                              width,
                              mode});
}

// Fills all but the lists. `bounds` are the same sizes and bounds as attention has them, for check_values.
inline SelectParams to_select_params(const SelectArgs& s, AttendParams& bounds) {
  const Layout x = to_layout(s.attend);
  AttendParams& a = bounds;
  a.batch = to_int32(x.batch, "batch");
  a.kv = to_key_values(s.attend, x);
  to_int32(x.batch * a.kv.num_heads, "batch times key heads");
  a.q = to_queries(s.attend, x);
  a.routing = to_route(s.attend, a);
  SelectParams p;
  p.batch = a.batch;
  p.head_dim = int32_t(s.attend.q.size(s.attend.q.dim() - 1));
  p.dtype = to_dtype(s.attend.q, "q");
  p.q = a.q;
  p.kv = a.kv;
  p.routing = a.routing;
  FLUX_CHECK(s.threshold > 0. && s.threshold <= 1., "threshold must be in (0, 1], got ", s.threshold);
  FLUX_CHECK(s.stride == 8 || s.stride == 16, "stride must be 8 or 16, got ", s.stride);
  FLUX_CHECK(s.width == 64 || s.width == 128, "width must be 64 or 128, got ", s.width);
  FLUX_CHECK(s.mode == 0 || s.mode == 1, "mode must be 0 (full) or 1 (sparse), got ", s.mode);
  p.threshold = s.threshold;
  p.stride = int32_t(s.stride);
  p.width = int32_t(s.width);
  p.mode = int32_t(s.mode);
  p.scale = float(s.scale);
  FLUX_CHECK(std::isfinite(p.scale), "scale must be a finite number in 32 bits, got ", s.scale);
  p.q_blocks = ceil_div(p.q.max_len, kQueryBlock);
  p.max_count = max_of(ceil_div(p.kv.rows.capacity, p.width), 1);
  return p;
}

// blocks and counts, allocated and put into the parameters; every entry is written by the operator.
inline std::tuple<Tensor, Tensor> make_lists(SelectParams& p, const Tensor& q) {
  Tensor blocks = torch::stable::new_empty(q, {p.batch, p.kv.num_heads, p.q_blocks, p.max_count}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(q, {p.batch, p.kv.num_heads, p.q_blocks}, ScalarType::Int);
  p.blocks = blocks.mutable_data_ptr<int32_t>();
  p.counts = counts.mutable_data_ptr<int32_t>();
  return {blocks, counts};
}

}  // namespace flux::torch_ops
