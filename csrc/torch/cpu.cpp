// The operators on the CPU.
#include "cpu/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "torch/append_args.h"
#include "torch/convert.h"
#include "torch/values.h"

namespace flux::torch_ops {
namespace {

// torch's own threads do the work, so torch.set_num_threads holds here too.
class TorchThreads : public cpu::Executor {
 public:
  int num_workers() const override { return int(torch::stable::get_num_threads()); }
  void run(int64_t n, const std::function<void(int64_t)>& body) const override {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }
};

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor route,
                                  std::vector<int64_t> patterns, OptionalTensor full_blocks, OptionalTensor full_counts,
                                  OptionalTensor sparse_blocks, OptionalTensor sparse_counts, double scale,
                                  OptionalTensor q_begin, OptionalTensor q_end, OptionalTensor kv_begin,
                                  OptionalTensor kv_end, OptionalTensor page_table) {
  const AttendArgs args{near(route), patterns,      full_blocks, full_counts,    sparse_blocks, sparse_counts,
                        scale,       near(q_begin), near(q_end), near(kv_begin), near(kv_end),  page_table};
  AttendParams p = to_attend_params(q, k, v, args);
  check_values(p, q, k, args);
  if (q.dim() == 3)
    check_disjoint(p.shape.q_rows, p.shape.batch, 1, "q_begin and q_end: sequences must not share rows of q");
  auto [out, lse] = make_outputs(q, q_begin || q_end);
  set_outputs(p, out, lse);
  cpu::attend(p, TorchThreads());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                   const Tensor& v, const Tensor& out, const Tensor& lse,
                                                   OptionalTensor route, std::vector<int64_t> patterns,
                                                   OptionalTensor full_blocks, OptionalTensor full_counts,
                                                   OptionalTensor sparse_blocks, OptionalTensor sparse_counts,
                                                   double scale, OptionalTensor q_begin, OptionalTensor q_end,
                                                   OptionalTensor kv_begin, OptionalTensor kv_end) {
  const OptionalTensor no_pages;
  // Rows no tile covers have gradient 0.
  Tensor grad_q = torch::stable::new_zeros(q, q.sizes());
  Tensor grad_k = torch::stable::new_zeros(k, k.sizes());
  Tensor grad_v = torch::stable::new_zeros(v, v.sizes());
  const Tensor grad = torch::stable::contiguous(grad_out);  // autograd may hand over an expanded one
  const AttendArgs args{near(route), patterns,      full_blocks, full_counts,    sparse_blocks, sparse_counts,
                        scale,       near(q_begin), near(q_end), near(kv_begin), near(kv_end),  no_pages};
  const AttendBackwardParams p = to_backward_params(grad, q, k, v, out, lse, args, grad_q, grad_k, grad_v);
  const ProblemShape& s = p.forward.shape;
  check_values(p.forward, q, k, args);
  if (q.dim() == 3) check_disjoint(s.q_rows, s.batch, 1, "q_begin and q_end: sequences must not share rows of q");
  if (k.dim() == 3)
    check_disjoint(s.kv_rows, s.batch, s.num_kv_heads,
                   "kv_begin and kv_end: there is no gradient where sequences share rows of k and v");
  cpu::attend_backward(p, TorchThreads());
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& x, std::vector<Tensor> weights, int64_t pool_size, bool per_head,
                                         OptionalTensor begin, OptionalTensor end) {
  const OptionalTensor near_begin = near(begin), near_end = near(end);
  RouteParams p = to_route_params(x, weights, pool_size, per_head, near_begin, near_end);
  check_spans(p.rows, p.batch, 1, "begin", "end");
  auto outputs = make_route_outputs(p, x);
  cpu::route(p, TorchThreads());
  return outputs;
}

void append(const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool, const Tensor& base,
            const Tensor& ring, const Tensor& page_table, const Tensor& kv_len, const Tensor& seen, const Tensor& slots,
            std::vector<int64_t> pattern, int64_t max_cache_len, OptionalTensor active) {
  const AppendParams p = to_append_params(k, v, k_pool, v_pool, base, ring, page_table, kv_len, seen, slots, pattern,
                                          max_cache_len, active);
  check_values(p);
  cpu::append(p, TorchThreads());
}

}  // namespace
}  // namespace flux::torch_ops

STABLE_TORCH_LIBRARY_IMPL(flux_ext, CPU, m) {
  m.impl("attend", TORCH_BOX(&flux::torch_ops::attend));
  m.impl("attend_backward", TORCH_BOX(&flux::torch_ops::attend_backward));
  m.impl("route", TORCH_BOX(&flux::torch_ops::route));
  m.impl("append", TORCH_BOX(&flux::torch_ops::append));
}
