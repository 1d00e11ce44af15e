// The operators on CUDA. Compiled by the host compiler; nvcc never sees a torch header.
//
// USE_CUDA (set by CMake for this file) declares the functions that live in libtorch_cuda; the one that is used is
// weak, so that the library also loads beside a CPU-only torch.
#include "cuda/cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cuda/mix.h"
#include "torch/append_args.h"
#include "torch/attend_args.h"
#include "torch/mix_args.h"
#include "torch/route_args.h"
#include "torch/select_args.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace flux::torch_ops {
namespace {

using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& t) {
  FLUX_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  // By hand: the macro that checks such calls has another name in each of torch's headers.
  if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("torch gives no current stream of " + device_of(t));
  return static_cast<cudaStream_t>(stream);
}

// The dispatcher comes here as soon as one tensor is on CUDA.
void check_on_cuda(const Tensor& t, const char* name) {
  FLUX_CHECK(t.is_cuda(), name, " must be on CUDA as another tensor is, got ", device_of(t));
}

void check_cuda(cudaError_t error, const char* stage) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // do not leave it to the next caller
  if (error == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error(
        "flux_ext was not built for this GPU: set FLUX_CUDA_ARCHS to its architecture and rebuild");
  throw std::runtime_error(std::string("flux_ext: ") + stage + ": " + cudaGetErrorString(error));
}

// Kernels read 16 bytes at a time.
bool is_aligned(const Tensor& t) {
  const int64_t vector = 16 / int64_t(t.element_size());
  bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) ok &= t.size(d) <= 1 || t.stride(d) % vector == 0;
  return ok;
}

// A tensor that is not aligned is copied first, which of a cache costs more than the attention to it. Said once for
// each argument.
Tensor aligned(const Tensor& t, const char* op, const char* name, std::atomic_flag& said) {
  if (is_aligned(t)) return t;
  if (!said.test_and_set()) {
    std::ostringstream s;
    s << "flux_ext::" << op << " copies " << name
      << " at every call, as its rows do not start at multiples of 16 bytes: "
      << "storage offset " << t.storage_offset() << ", strides [";
    for (int64_t d = 0; d < t.dim(); ++d) s << (d ? ", " : "") << t.stride(d);
    s << "]. Make the storage offset and all strides but the last multiples of " << 16 / int64_t(t.element_size())
      << " elements to avoid this.";
    aoti_torch_warn(__func__, __FILE__, __LINE__, s.str().c_str());
  }
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  return torch::stable::copy_(copy, t);
}

AttendParams to_cuda_params(const AttendArgs& a) {
  AttendParams p = to_attend_params(a);
  FLUX_CHECK(p.dtype != DType::kFloat32, "q must be float16 or bfloat16 on CUDA, got float32");
  if (p.kv.page_table && p.kv.num_pages == 0) p.kv.rows.capacity = 0;
  return p;
}

void check_status(const cuda::Status& status) {
  if (status.error != cudaSuccess) check_cuda(status.error, status.what);
  FLUX_CHECK(status.ok(), status.what);
}

std::tuple<Tensor, Tensor> attend(const AttendArgs& a) {
  check_on_cuda(a.q, "q");
  const DeviceGuard guard(a.q.get_device_index());
  AttendParams p = to_cuda_params(a);
  static std::atomic_flag said_q = ATOMIC_FLAG_INIT, said_k = ATOMIC_FLAG_INIT, said_v = ATOMIC_FLAG_INIT;
  const Tensor q = aligned(a.q, "attend", "q", said_q), k = aligned(a.k, "attend", "k", said_k),
               v = aligned(a.v, "attend", "v", said_v);
  p.q.data = q.const_data_ptr(), p.q.stride = strides_of(q);
  p.kv.k = view_of(k), p.kv.v = view_of(v);
  auto [out, lse] = make_outputs(q, a.q_begin || a.q_end);
  set_outputs(p, out, lse);
  if (out.numel() == 0 || p.batch == 0) return {out, lse};

  cuda::AttendConfig config;
  check_status(cuda::configure(p, &config));
  const auto bytes = int64_t(cuda::lay_out(p, config, nullptr).bytes);
  const Tensor memory = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  check_status(cuda::attend(p, config, memory.mutable_data_ptr(), current_stream(q)));
  return {out, lse};
}

// The gradient starts as 0 where rows may belong to no sequence, which nobody writes.
Tensor new_gradient(const Tensor& t, bool may_have_gaps) {
  return may_have_gaps ? torch::stable::new_zeros(t, t.sizes()) : torch::stable::new_empty(t, t.sizes());
}

// A tensor that autograd or the forward pass made; copied where kernels cannot read it as it is (an expanded one, say).
Tensor readable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const bool ok = t.dim() > 0 && (t.stride(last) == 1 || t.size(last) <= 1) && is_aligned(t);
  if (ok) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  return torch::stable::copy_(copy, t);
}

// Gradients of q, k and v, and the tensors they are computed from, which kernels can read.
struct Gradients {
  bool no_queries;
  Tensor of_q, of_k, of_v;
  Tensor q, k, v, grad_out, out, lse;

  Gradients(const BackwardArgs& b, const char* op)
      : no_queries(b.forward.q.numel() == 0),
        of_q(new_gradient(b.forward.q, b.forward.q_begin || b.forward.q_end)),
        of_k(new_gradient(b.forward.k, no_queries || b.forward.kv_begin || b.forward.kv_end)),
        of_v(new_gradient(b.forward.v, no_queries || b.forward.kv_begin || b.forward.kv_end)) {
    static std::atomic_flag said_q = ATOMIC_FLAG_INIT, said_k = ATOMIC_FLAG_INIT, said_v = ATOMIC_FLAG_INIT;
    q = aligned(b.forward.q, op, "q", said_q), k = aligned(b.forward.k, op, "k", said_k);
    v = aligned(b.forward.v, op, "v", said_v);
    grad_out = readable(b.grad_out), out = readable(b.out), lse = torch::stable::contiguous(b.lse);
  }

  AttendBackwardParams params(const BackwardArgs& b) const {
    const AttendArgs& a = b.forward;
    const AttendArgs given{q,
                           k,
                           v,
                           a.route,
                           a.patterns,
                           a.full_blocks,
                           a.full_counts,
                           a.sparse_blocks,
                           a.sparse_counts,
                           a.scale,
                           a.q_begin,
                           a.q_end,
                           a.kv_begin,
                           a.kv_end,
                           a.page_table};
    const AttendBackwardParams p = to_backward_params({grad_out, out, lse, given}, grad_out, of_q, of_k, of_v);
    FLUX_CHECK(p.forward.dtype != DType::kFloat32, "q must be float16 or bfloat16 on CUDA, got float32");
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> attend_backward(const BackwardArgs& b) {
  check_on_cuda(b.forward.q, "q");
  const DeviceGuard guard(b.forward.q.get_device_index());
  const Gradients grad(b, "attend_backward");
  const AttendBackwardParams p = grad.params(b);
  if (grad.no_queries || p.forward.batch == 0) return {grad.of_q, grad.of_k, grad.of_v};
  const auto bytes = int64_t(cuda::lay_out(p, cuda::adds_in_order(p), nullptr).bytes);
  const Tensor memory = torch::stable::new_empty(grad.q, {bytes}, ScalarType::Byte);
  check_status(cuda::attend_backward(p, memory.mutable_data_ptr(), current_stream(grad.q)));
  return {grad.of_q, grad.of_k, grad.of_v};
}

void check_in_parts(const AttendParams& p) {
  FLUX_CHECK(is_in_parts(p.routing), "full must show every key on CUDA, where one walk makes both branches");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mix(const MixArgs& a) {
  check_on_cuda(a.attend.q, "q");
  const DeviceGuard guard(a.attend.q.get_device_index());
  AttendParams p = to_cuda_params(a.attend);
  Mixture m = to_mixture(a.weight, a.attend.q, p);
  check_in_parts(p);
  static std::atomic_flag said_q = ATOMIC_FLAG_INIT, said_k = ATOMIC_FLAG_INIT, said_v = ATOMIC_FLAG_INIT;
  const Tensor q = aligned(a.attend.q, "mix", "q", said_q), k = aligned(a.attend.k, "mix", "k", said_k),
               v = aligned(a.attend.v, "mix", "v", said_v);
  p.q.data = q.const_data_ptr(), p.q.stride = strides_of(q);
  p.kv.k = view_of(k), p.kv.v = view_of(v);
  const MixOutputs outputs(a, p, m);
  if (outputs.mixed.numel() == 0 || p.batch == 0) return outputs.all();
  p.routing = sparse_alone(p.routing);
  const Tensor memory = torch::stable::new_empty(q, {int64_t(cuda::kMixBytes)}, ScalarType::Byte);
  check_status(cuda::mix(p, m, memory.mutable_data_ptr(), current_stream(q)));
  return outputs.all();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_backward(const MixBackwardArgs& b) {
  const Tensor& q = b.attend.forward.q;
  check_on_cuda(q, "q");
  const DeviceGuard guard(q.get_device_index());
  const Gradients grad(b.attend, "mix_backward");
  cuda::MixBackwardParams p{grad.params(b.attend), {}};
  p.mixture = to_mixture(b.weight, q, p.forward);
  check_sparse_outputs(b);
  check_in_parts(p.forward);
  const Tensor sparse = readable(b.sparse), sparse_lse = torch::stable::contiguous(b.sparse_lse);
  set_sparse_outputs(p.mixture, sparse, sparse_lse);
  // A sequence head without queries has gradient 0.
  Tensor grad_weight = torch::stable::new_zeros(b.weight, b.weight.sizes());
  set_grad_weight(p.mixture, grad_weight);
  if (!grad.no_queries && p.forward.batch != 0) {
    p.forward.routing = sparse_alone(p.forward.routing);
    const auto bytes = int64_t(cuda::lay_out(p, cuda::can_add_in_order(p), nullptr).bytes);
    const Tensor memory = torch::stable::new_empty(grad.q, {bytes}, ScalarType::Byte);
    check_status(cuda::mix_backward(p, memory.mutable_data_ptr(), current_stream(grad.q)));
  }
  return {grad.of_q, grad.of_k, grad.of_v, grad_weight};
}

// The strides of a new tensor like `t`.
Strides new_strides(const Tensor& t) {
  const int64_t n = t.dim(), row = t.size(n - 1) * t.size(n - 2);
  return {n == 4 ? row * t.size(1) : 0, row, t.size(n - 1)};
}

// As `attend` chooses, but without copies and outputs: what would be allocated is described by a null address, which is
// as aligned as that of new memory.
Tensor explain(const AttendArgs& a) {
  check_on_cuda(a.q, "q");
  const DeviceGuard guard(a.q.get_device_index());
  AttendParams p = to_cuda_params(a);
  const bool copies_q = !is_aligned(a.q), copies_k = !is_aligned(a.k), copies_v = !is_aligned(a.v);
  if (copies_q) p.q.data = nullptr, p.q.stride = new_strides(a.q);
  if (copies_k) p.kv.k = {nullptr, new_strides(a.k)};
  if (copies_v) p.kv.v = {nullptr, new_strides(a.v)};
  p.out = {nullptr, new_strides(a.q)};
  Explanation e;
  check_status(cuda::explain(p, &e));
  e.copies = copies_q + 2 * copies_k + 4 * copies_v;
  return to_tensor(e);
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& x, std::vector<Tensor> weights, int64_t pool_size, bool per_head,
                                         OptionalTensor begin, OptionalTensor end) {
  constexpr int32_t kMaxRouterDim = 512;
  check_on_cuda(x, "x");
  const DeviceGuard guard(x.get_device_index());
  const OptionalTensor near_begin = near(begin), near_end = near(end);
  RouteParams p = to_route_params(x, weights, pool_size, per_head, near_begin, near_end);
  FLUX_CHECK(p.head_dim <= kMaxRouterDim, "x must have a head_dim of at most ", kMaxRouterDim, " on CUDA, got ",
             p.head_dim);
  auto outputs = make_route_outputs(p, x);
  const cudaError_t error = cuda::route(p, current_stream(x));
  int32_t width = 0;
  for (const Linear& l : p.layers) width = max_of(width, l.out);
  FLUX_CHECK(error != cudaErrorNotSupported,
             "weights must be of layers that fit into this GPU's shared memory, got one of width ", width);
  check_cuda(error, "route");
  return outputs;
}

std::tuple<Tensor, Tensor> select_blocks(const SelectArgs& s) {
  const AttendArgs& a = s.attend;
  check_on_cuda(a.q, "q");
  const DeviceGuard guard(a.q.get_device_index());
  AttendParams bounds;
  SelectParams p = to_select_params(s, bounds);
  FLUX_CHECK(p.dtype != DType::kFloat32, "q must be float16 or bfloat16 on CUDA, got float32");
  if (p.kv.page_table && p.kv.num_pages == 0) p.kv.rows.capacity = 0;
  static std::atomic_flag said_q = ATOMIC_FLAG_INIT, said_k = ATOMIC_FLAG_INIT;
  const Tensor q = aligned(a.q, "select_blocks", "q", said_q), k = aligned(a.k, "select_blocks", "k", said_k);
  p.q.data = q.const_data_ptr(), p.q.stride = strides_of(q);
  p.kv.k = view_of(k);
  auto lists = make_lists(p, q);
  if (p.batch == 0 || p.q_blocks == 0) return lists;

  cuda::SelectConfig config;
  check_status(cuda::configure(p, &config));
  const Tensor memory = torch::stable::new_empty(q, {int64_t(config.bytes)}, ScalarType::Byte);
  check_status(cuda::select(p, config, memory.mutable_data_ptr(), current_stream(q)));
  return lists;
}

void append(const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool, const Tensor& base,
            const Tensor& ring, const Tensor& page_table, const Tensor& kv_len, const Tensor& seen, const Tensor& slots,
            std::vector<int64_t> pattern, int64_t max_cache_len, OptionalTensor active) {
  check_on_cuda(k, "k");
  const DeviceGuard guard(k.get_device_index());
  const AppendParams p = to_append_params(k, v, k_pool, v_pool, base, ring, page_table, kv_len, seen, slots, pattern,
                                          max_cache_len, active);
  check_cuda(cuda::append(p, current_stream(k)), "append");
}

}  // namespace
}  // namespace flux::torch_ops

STABLE_TORCH_LIBRARY_IMPL(flux_ext, CUDA, m) {
  m.impl("attend", TORCH_BOX(&flux::torch_ops::with_attend_args<flux::torch_ops::attend>));
  m.impl("attend_backward", TORCH_BOX(&flux::torch_ops::with_backward_args<flux::torch_ops::attend_backward>));
  m.impl("mix", TORCH_BOX(&flux::torch_ops::with_mix_args<flux::torch_ops::mix>));
  m.impl("mix_backward", TORCH_BOX(&flux::torch_ops::with_mix_backward_args<flux::torch_ops::mix_backward>));
  m.impl("explain", TORCH_BOX(&flux::torch_ops::with_attend_args<flux::torch_ops::explain>));
  m.impl("route", TORCH_BOX(&flux::torch_ops::route));
  m.impl("select_blocks", TORCH_BOX(&flux::torch_ops::with_select_args<flux::torch_ops::select_blocks>));
  m.impl("append", TORCH_BOX(&flux::torch_ops::append));
}
