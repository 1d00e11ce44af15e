// The arguments of `mix` and `mix_backward` to their parameter structs, checked.
#pragma once

#include <vector>

#include "core/mixture.h"
#include "torch/attend_args.h"

namespace flux::torch_ops {

struct MixArgs {
  const Tensor& weight;
  AttendArgs attend;  // without a route
};

template <auto kOperator>
auto with_mix_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weight,
                   std::vector<int64_t> patterns, OptionalTensor full_blocks, OptionalTensor full_counts,
                   OptionalTensor sparse_blocks, OptionalTensor sparse_counts, double scale, OptionalTensor q_begin,
                   OptionalTensor q_end, OptionalTensor kv_begin, OptionalTensor kv_end, OptionalTensor page_table) {
  const OptionalTensor no_route;
  return kOperator(MixArgs{weight,
                           {q, k, v, no_route, patterns, full_blocks, full_counts, sparse_blocks, sparse_counts, scale,
                            near(q_begin), near(q_end), near(kv_begin), near(kv_end), page_table}});
}

// As `mix` returned what it gives by each pattern.
struct MixBackwardArgs {
  const Tensor &sparse, &sparse_lse, &weight;
  BackwardArgs attend;  // its out and lse are those of the full pattern
};

template <auto kOperator>
auto with_mix_backward_args(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& full, const Tensor& sparse, const Tensor& full_lse, const Tensor& sparse_lse,
                            const Tensor& weight, std::vector<int64_t> patterns, OptionalTensor full_blocks,
                            OptionalTensor full_counts, OptionalTensor sparse_blocks, OptionalTensor sparse_counts,
                            double scale, OptionalTensor q_begin, OptionalTensor q_end, OptionalTensor kv_begin,
                            OptionalTensor kv_end) {
  const OptionalTensor no_route, no_pages;
  return kOperator(
      MixBackwardArgs{sparse,
                      sparse_lse,
                      weight,
                      {grad_out,
                       full,
                       full_lse,
                       {q, k, v, no_route, patterns, full_blocks, full_counts, sparse_blocks, sparse_counts, scale,
                        near(q_begin), near(q_end), near(kv_begin), near(kv_end), no_pages}}});
}

// The weight alone.
inline Mixture to_mixture(const Tensor& weight, const Tensor& q, const AttendParams& p) {
  FLUX_CHECK(weight.scalar_type() == ScalarType::Float, "a fractional route must be float32 here, got ",
             name_of(weight.scalar_type()));
  FLUX_CHECK(weight.is_cuda() == q.is_cuda() && weight.get_device_index() == q.get_device_index(),
             "route must be on the device of q (", device_of(q), "), got ", device_of(weight));
  FLUX_CHECK(
      (weight.dim() == 1 || (weight.dim() == 2 && weight.size(1) == p.kv.num_heads)) && weight.size(0) == p.batch,
      "route must be [", p.batch, "] or [", p.batch, ", ", p.kv.num_heads, "], got ", shape_of(weight));
  Mixture m;
  m.weight = weight.const_data_ptr<float>();
  m.stride_b = weight.stride(0);
  m.stride_h = weight.dim() == 2 ? weight.stride(1) : 0;
  return m;
}

inline void set_sparse_outputs(Mixture& m, const Tensor& sparse, const Tensor& sparse_lse) {
  m.sparse_out = mutable_view_of(sparse);
  m.sparse_lse = sparse_lse.mutable_data_ptr<float>();
}

// The outputs of `mix`.
struct MixOutputs {
  Tensor mixed, full, sparse, full_lse, sparse_lse;

  MixOutputs(const MixArgs& a, AttendParams& p, Mixture& m) {
    const Tensor& q = a.attend.q;
    const bool may_have_gaps = a.attend.q_begin || a.attend.q_end;
    std::tie(full, full_lse) = make_outputs(q, may_have_gaps);
    std::tie(sparse, sparse_lse) = make_outputs(q, may_have_gaps);
    mixed = may_have_gaps ? torch::stable::new_zeros(q, q.sizes()) : torch::stable::new_empty(q, q.sizes());
    set_outputs(p, full, full_lse);
    set_sparse_outputs(m, sparse, sparse_lse);
    m.mixed = mutable_view_of(mixed);
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> all() const { return {mixed, full, sparse, full_lse, sparse_lse}; }
};

inline void set_grad_weight(Mixture& m, const Tensor& grad_weight) {
  m.grad_weight = grad_weight.mutable_data_ptr<float>();
  m.grad_stride_b = grad_weight.stride(0);
  m.grad_stride_h = grad_weight.dim() == 2 ? grad_weight.stride(1) : 0;
}

inline void check_sparse_outputs(const MixBackwardArgs& b) {
  check_like(b.sparse, b.attend.forward.q, "sparse", "q");
  check_shape(b.sparse, b.attend.forward.q, "sparse");
  check_last_contiguous(b.sparse, "sparse");
  const Tensor &full_lse = b.attend.lse, &sparse_lse = b.sparse_lse;
  bool same = sparse_lse.scalar_type() == full_lse.scalar_type() && sparse_lse.dim() == full_lse.dim();
  for (int64_t i = 0; same && i < full_lse.dim(); ++i)
    same = sparse_lse.size(i) == full_lse.size(i) && sparse_lse.stride(i) == full_lse.stride(i);
  same &= sparse_lse.is_cuda() == full_lse.is_cuda() && sparse_lse.get_device_index() == full_lse.get_device_index();
  FLUX_CHECK(same, "sparse_lse must be like full_lse, ", name_of(full_lse.scalar_type()), " ", shape_of(full_lse),
             " on ", device_of(full_lse), ", got ", name_of(sparse_lse.scalar_type()), " ", shape_of(sparse_lse),
             " on ", device_of(sparse_lse));
}

}  // namespace flux::torch_ops
