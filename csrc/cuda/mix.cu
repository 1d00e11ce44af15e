// Mixtures on CUDA: the choice of the kernels, the index of the block lists, and the gradient of the weight.
#include <climits>

#include "cuda/dependent_launch.h"
#include "cuda/mix.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/mix_kernels.h"
#ifdef FLUX_SM90
#include "cuda/sm90/mix_kernels.h"
#endif

namespace flux::cuda {
namespace {

constexpr int kThreads = 256;

// Which query blocks have a block of keys not on their list. (Bits beyond the last query block mean nothing.)
__global__ void __launch_bounds__(kThreads) invert_kernel(const uint32_t* listed, uint32_t* unlisted, int64_t words) {
  const int64_t word = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (word < words) unlisted[word] = ~listed[word];
}

// As many as a block may have: an entry of the weight has one block, and up to all rows of a sequence.
constexpr int kWeightThreads = 1024;

// Adds up the rows of one entry of the weight, in double precision and a fixed order.
__global__ void __launch_bounds__(kWeightThreads)
    weight_kernel(const __grid_constant__ MixBackwardParams b, const __grid_constant__ MixBackwardWorkspace w) {
  const AttendParams& p = b.forward;
  const Mixture& m = b.mixture;
  const bool per_head = m.grad_stride_h != 0;
  const int32_t seq = blockIdx.x, first_head = per_head ? blockIdx.y : 0;
  double sum = 0;
  for (int32_t h = first_head; h < (per_head ? first_head + 1 : p.kv.num_heads); ++h) {
    const Span rows = p.q.rows(seq, h);
    for (int32_t head = h * p.group(); head < (h + 1) * p.group(); ++head)
#pragma unroll 4  // loads under way at once
      for (int32_t row = rows.begin + int32_t(threadIdx.x); row < rows.end; row += kWeightThreads) {
        const Strides& s = w.parts[0].row;
        sum += w.of_weight[seq * s.b + row * s.s + head * s.h];
      }
  }
  __shared__ double sums[kWeightThreads];
  sums[threadIdx.x] = sum;
  for (int n = kWeightThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < n) sums[threadIdx.x] += sums[threadIdx.x + n];
  }
  if (threadIdx.x == 0) m.grad_weight[seq * m.grad_stride_b + first_head * m.grad_stride_h] = float(sums[0]);
}

// The kernels for a problem.
template <DType kDType, typename F>
cudaError_t with_kernels(int32_t head_dim, F f) {
  if (head_dim <= 64) return f(sm80::MixKernels<kDType, 64>());
  if (head_dim <= 128) return f(sm80::MixKernels<kDType, 128>());
  return f(sm80::MixKernels<kDType, 256>());
}
template <typename F>
cudaError_t with_kernels(const AttendParams& p, F f) {
  return p.dtype == DType::kFloat16 ? with_kernels<DType::kFloat16>(p.head_dim, f)
                                    : with_kernels<DType::kBFloat16>(p.head_dim, f);
}

#ifdef FLUX_SM90
// Do Hopper's kernels take the gradients? Their blocks own and visit 128 keys, which must be those of one entry of a
// list.
bool gradients_on_sm90(const AttendParams& p, const Device& device) {
  const BlockTable& lists = p.routing.blocks[0];
  return device.capability == 90 && p.head_dim <= 128 && (!lists.blocks || lists.kv_width == 128);
}
template <DType kDType, typename F>
cudaError_t with_sm90_kernels(int32_t head_dim, F f) {
  if (head_dim <= 64) return f(sm90::MixBackwardKernels<kDType, 64>());
  if (head_dim <= 96) return f(sm90::MixBackwardKernels<kDType, 96>());
  return f(sm90::MixBackwardKernels<kDType, 128>());
}
#endif

// The kernels of the gradients.
template <typename F>
cudaError_t with_backward_kernels(const AttendParams& p, [[maybe_unused]] const Device& device, F f) {
#ifdef FLUX_SM90
  if (gradients_on_sm90(p, device))
    return p.dtype == DType::kFloat16 ? with_sm90_kernels<DType::kFloat16>(p.head_dim, f)
                                      : with_sm90_kernels<DType::kBFloat16>(p.head_dim, f);
#endif
  return with_kernels(p, f);
}

Status queries_and_keys_backward(const MixBackwardParams& b, const MixBackwardWorkspace& w, const Device& device,
                                 cudaStream_t stream) {
  const AttendParams& p = b.forward;
#ifdef FLUX_SM90
  if (w.parts[kSparsePart].dq) {
    const cudaError_t e = p.dtype == DType::kFloat16
                              ? sm90::launch_ordered_mix_backward<DType::kFloat16>(b, w, device, stream)
                              : sm90::launch_ordered_mix_backward<DType::kBFloat16>(b, w, device, stream);
    if (e) return {"gradients of a mixture", e};
    return {};
  }
#endif
  const auto queries = [&](auto kernels) { return kernels.launch_queries(b, w, stream); };
  const auto keys = [&](auto kernels) { return kernels.launch_keys(b, w, stream); };
  if (cudaError_t e = with_backward_kernels(p, device, queries)) return {"gradient of the queries", e};
  if (cudaError_t e = with_backward_kernels(p, device, keys)) return {"gradient of the keys", e};
  return {};
}

}  // namespace

Status mix(const AttendParams& p, const Mixture& m, [[maybe_unused]] void* memory, cudaStream_t stream) {
  Device device{};
  if (const Status s = supported_device(p.dtype, &device); !s.ok()) return s;
  const int32_t rows = sm80::most_tile_rows(p.head_dim);
  if (p.group() > rows) return {no_kernel_fits(p.head_dim), cudaSuccess};
  if (MixTiles(p, rows, 1).total() > INT_MAX) return {"q must have at most 2^31 tiles: split the batch", cudaSuccess};
#ifdef FLUX_SM90
  if (device.capability == 90 && sm90::mixes(p)) {
    if (cudaError_t e = sm90::mix(p, m, static_cast<int32_t*>(memory), device, stream)) return {"mix", e};
    return {};
  }
#endif
  if (cudaError_t e = with_kernels(p, [&](auto kernels) { return kernels.launch(p, m, stream); })) return {"mix", e};
  return {};
}

Status mix_backward(const MixBackwardParams& b, void* memory, cudaStream_t stream) {
  const AttendParams& p = b.forward;
  const Mixture& m = b.mixture;
  Device device{};
  if (const Status s = supported_device(p.dtype, &device); !s.ok()) return s;
  if (const Status s = check_counts(b); !s.ok()) return s;
  const MixBackwardWorkspace w = lay_out(b, can_add_in_order(b), memory);
  if (const BackwardWorkspace& lists = w.parts[kSparsePart]; lists.listed) {
    const int64_t words = int64_t(num_seq_heads(p)) * lists.listed_blocks * lists.listed_words;
    if (cudaError_t e = index_lists(p, lists, stream)) return {"index of the block lists", e};
    if (words > 0)
      if (cudaError_t e = launch(invert_kernel, dim3(unsigned(ceil_div_64(words, kThreads))), kThreads, 0, stream,
                                 false, lists.listed, w.parts[kRestPart].listed, words))
        return {"index of the block lists", e};
  }
  if (const Status s = queries_and_keys_backward(b, w, device, stream); !s.ok()) return s;
  const dim3 entries(p.batch, m.grad_stride_h ? p.kv.num_heads : 1);
  if (cudaError_t e = launch(weight_kernel, entries, kWeightThreads, 0, stream, false, b, w))
    return {"gradient of the weight", e};
  return {};
}

}  // namespace flux::cuda
