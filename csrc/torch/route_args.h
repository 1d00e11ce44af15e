// The arguments of `route` to its parameter struct, checked. Shared by the CPU and the CUDA operator.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "torch/convert.h"

namespace flux::torch_ops {

inline RouteParams to_route_params(const Tensor& x, const std::vector<Tensor>& weights, int64_t pool_size,
                                   bool per_head, const OptionalTensor& begin, const OptionalTensor& end) {
  RouteParams p;
  const bool packed = x.dim() == 3;
  FLUX_CHECK(x.dim() == 4 || packed, "x must be [B, S, H, D] or packed [T, H, D], got ", shape_of(x));
  FLUX_CHECK(!packed || (begin && end), "a packed x [T, H, D] needs begin and end");
  FLUX_CHECK(!packed || begin->dim() == 1, "begin must be [B], got ", shape_of(*begin));
  check_last_contiguous(x, "x");
  p.dtype = to_dtype(x, "x");
  const int64_t n = x.dim();
  const int64_t batch = packed ? begin->size(0) : x.size(0);
  p.batch = to_int32(batch, "batch");
  p.num_heads = to_int32(x.size(n - 2), "the number of heads");
  to_int32(batch * p.num_heads, "batch times heads");
  p.head_dim = to_int32(x.size(n - 1), "head_dim");
  FLUX_CHECK(p.head_dim >= 1, "x must have a head_dim of at least 1, got ", shape_of(x));
  FLUX_CHECK(p.num_heads >= 1, "x must have at least one head, got ", shape_of(x));
  FLUX_CHECK(pool_size >= 1, "pool_size must be >= 1, got ", pool_size);
  const int32_t rows = to_rows(x.size(n - 3), "x");
  p.pool_size = int32_t(pool_size < kUnlimited ? pool_size : kUnlimited);
  to_int32(int64_t(2) * min_of(p.pool_size, rows) * p.num_heads, "the number of pooled rows of all heads");
  p.per_head = per_head;
  p.x = x.const_data_ptr();
  p.x_stride = strides_of(x);
  p.rows = to_spans(begin, end, x, batch, 1, rows, false, "begin", "end");
  FLUX_CHECK(weights.size() == 2 * kRouterLayers, "weights must be ", 2 * kRouterLayers,
             " tensors (weight and bias of five layers), got ", weights.size());
  p.weight_dtype = to_dtype(weights[0], "weights[0]");
  int64_t in = p.head_dim;
  for (int i = 0; i < kRouterLayers; ++i) {
    const Tensor &w = weights[2 * i], &b = weights[2 * i + 1];
    const std::string name = "weights[" + std::to_string(2 * i) + "]";
    check_like(w, weights[0], name.c_str(), "weights[0]");
    check_like(b, weights[0], "a bias", "weights[0]");
    FLUX_CHECK(w.is_cuda() == x.is_cuda() && w.get_device_index() == x.get_device_index(), name,
               " must be on the device of x (", device_of(x), "), got ", device_of(w));
    FLUX_CHECK(w.dim() == 2 && w.size(1) == in && w.is_contiguous(), name, " must be contiguous [out, ", in, "], got ",
               shape_of(w));
    FLUX_CHECK(b.dim() == 1 && b.size(0) == w.size(0) && b.is_contiguous(), "weights[", 2 * i + 1, "] must be [",
               w.size(0), "], got ", shape_of(b));
    p.layers[i] = {w.const_data_ptr(), b.const_data_ptr(), int32_t(in), to_int32(w.size(0), "a layer's width")};
    in = w.size(0);
  }
  FLUX_CHECK(in == 2, "the last layer of a router has 2 outputs, got ", in);
  return p;
}

// pooled, logits and decisions of `route`, allocated and put into its parameters.
inline std::tuple<Tensor, Tensor, Tensor> make_route_outputs(RouteParams& p, const Tensor& x) {
  std::vector<int64_t> leading{p.batch};
  if (p.per_head) leading.push_back(p.num_heads);
  std::vector<int64_t> pooled_sizes = leading, logit_sizes = leading;
  pooled_sizes.push_back(p.head_dim);
  logit_sizes.push_back(2);
  Tensor pooled = torch::stable::new_empty(x, pooled_sizes, ScalarType::Float);
  Tensor logits = torch::stable::new_empty(x, logit_sizes, ScalarType::Float);
  Tensor decision = torch::stable::new_empty(x, leading, ScalarType::Int);
  p.pooled = pooled.mutable_data_ptr<float>();
  p.logits = logits.mutable_data_ptr<float>();
  p.route = decision.mutable_data_ptr<int32_t>();
  return {pooled, logits, decision};
}

}  // namespace flux::torch_ops
