// The operators on the CPU.
#include "cpu/cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "torch/append_args.h"
#include "torch/attend_args.h"
#include "torch/mix_args.h"
#include "torch/route_args.h"
#include "torch/select_args.h"
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

// Rows of q that two sequences claim would be written by both.
void check_disjoint_queries(const AttendParams& p, const AttendArgs& a) {
  if (a.q.dim() == 3) check_disjoint(p.q.rows, p.batch, 1, "q_begin and q_end: sequences must not share rows of q");
}

std::tuple<Tensor, Tensor> attend(const AttendArgs& a) {
  AttendParams p = to_attend_params(a);
  check_values(p, a);
  check_disjoint_queries(p, a);
  auto [out, lse] = make_outputs(a.q, a.q_begin || a.q_end);
  set_outputs(p, out, lse);
  cpu::attend(p, TorchThreads());
  return {out, lse};
}

Tensor explain(const AttendArgs& a) { return to_tensor(cpu::explain(to_attend_params(a), TorchThreads())); }

// Gradients of q, k and v. Rows no tile covers have gradient 0.
struct Gradients {
  Tensor q, k, v;
  Tensor of_out;  // autograd may hand over an expanded one

  explicit Gradients(const BackwardArgs& b)
      : q(torch::stable::new_zeros(b.forward.q, b.forward.q.sizes())),
        k(torch::stable::new_zeros(b.forward.k, b.forward.k.sizes())),
        v(torch::stable::new_zeros(b.forward.v, b.forward.v.sizes())),
        of_out(torch::stable::contiguous(b.grad_out)) {}

  AttendBackwardParams params(const BackwardArgs& b) const {
    const AttendBackwardParams p = to_backward_params(b, of_out, q, k, v);
    const AttendArgs& a = b.forward;
    check_values(p.forward, a);
    check_disjoint_queries(p.forward, a);
    if (a.k.dim() == 3)
      check_disjoint(p.forward.kv.rows, p.forward.batch, p.forward.kv.num_heads,
                     "kv_begin and kv_end: there is no gradient where sequences share rows of k and v");
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> attend_backward(const BackwardArgs& b) {
  const Gradients grad(b);
  cpu::attend_backward(grad.params(b), TorchThreads());
  return {grad.q, grad.k, grad.v};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix(const MixArgs& a) {
  AttendParams p = to_attend_params(a.attend);
  Mixture m = to_mixture(a.weight, a.attend.q, p);
  check_values(p, a.attend);
  check_disjoint_queries(p, a.attend);
  const MixOutputs outputs(a, p, m);
  cpu::mix(p, m, TorchThreads());
  return outputs.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_backward(const MixBackwardArgs& b) {
  const Gradients grad(b.attend);
  const AttendBackwardParams p = grad.params(b.attend);
  Mixture m = to_mixture(b.weight, b.attend.forward.q, p.forward);
  check_sparse_outputs(b);
  set_sparse_outputs(m, b.sparse, b.sparse_lse);
  // A sequence head without queries has gradient 0.
  Tensor grad_weight = torch::stable::new_zeros(b.weight, b.weight.sizes());
  set_grad_weight(m, grad_weight);
  cpu::mix_backward(p, m, TorchThreads());
  return {grad.q, grad.k, grad.v, grad_weight};
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

std::tuple<Tensor, Tensor> select_blocks(const SelectArgs& s) {
  AttendParams bounds;
  SelectParams p = to_select_params(s, bounds);
  check_values(bounds, s.attend);
  auto lists = make_lists(p, s.attend.q);
  cpu::select(p, TorchThreads());
  return lists;
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
  m.impl("attend", TORCH_BOX(&flux::torch_ops::with_attend_args<flux::torch_ops::attend>));
  m.impl("explain", TORCH_BOX(&flux::torch_ops::with_attend_args<flux::torch_ops::explain>));
  m.impl("attend_backward", TORCH_BOX(&flux::torch_ops::with_backward_args<flux::torch_ops::attend_backward>));
  m.impl("mix", TORCH_BOX(&flux::torch_ops::with_mix_args<flux::torch_ops::mix>));
  m.impl("mix_backward", TORCH_BOX(&flux::torch_ops::with_mix_backward_args<flux::torch_ops::mix_backward>));
  m.impl("route", TORCH_BOX(&flux::torch_ops::route));
  m.impl("select_blocks", TORCH_BOX(&flux::torch_ops::with_select_args<flux::torch_ops::select_blocks>));
  m.impl("append", TORCH_BOX(&flux::torch_ops::append));
}
