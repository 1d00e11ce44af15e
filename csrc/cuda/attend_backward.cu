// The gradients of attention on CUDA: the index of the block lists, and the choice of the kernels (backward.h).
#include <climits>

#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/backward_kernels.h"

namespace flux::cuda {
namespace {

constexpr int kThreads = 256;

// Which query blocks have a block of keys on their list? A warp asks 32 lists for one word of the answer.
__global__ void __launch_bounds__(kThreads)
    list_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ BackwardWorkspace w, int64_t words) {
  const int64_t word = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (word >= words) return;
  const auto first = int32_t(word % w.listed_words) * 32, block = int32_t(word / w.listed_words % w.listed_blocks);
  const auto seq_head = int32_t(word / w.listed_words / w.listed_blocks);
  const int32_t seq = seq_head / p.kv.num_heads, kv_head = seq_head % p.kv.num_heads;
  const BlockTable& table = p.routing.blocks[p.routing.mode(seq, kv_head)];
  if (!table.blocks) return;
  const int32_t lane = threadIdx.x % 32, entry = first + lane;
  bool listed = false;
  if (entry < table.q_blocks) {
    const BlockList list = table(seq, kv_head, p.kv.num_heads, entry * table.q_width);
    KvBlocks blocks;
    blocks.list = list.blocks;
    blocks.window_count = list.count;
    listed = contains(blocks, block);
  }
  const uint32_t bits = __ballot_sync(~0u, listed);
  if (lane == 0) w.listed[word] = bits;
}

template <typename Kernels>
Status run(const AttendBackwardParams& b, const BackwardWorkspace& w, cudaStream_t stream) {
  if (cudaError_t e = Kernels::launch_queries(b, w, stream)) return {"gradient of the queries", e};
  if (cudaError_t e = Kernels::launch_keys(b, w, stream)) return {"gradient of the keys", e};
  return {};
}

#ifdef FLUX_SM90
// Its blocks own or visit up to 128 keys, which must be those of one entry of a list.
bool runs_on_sm90(const AttendParams& p, const Device& device) {
  if (device.capability != 90) return false;
  for (const BlockTable& t : p.routing.blocks)
    if (t.blocks && t.kv_width != 128) return false;
  return true;
}
#endif

template <DType kDType>
Status run(const AttendBackwardParams& b, const BackwardWorkspace& w, [[maybe_unused]] const Device& device,
           cudaStream_t stream) {
  const int32_t dim = b.forward.head_dim;
#ifdef FLUX_SM90
  if (w.dq) {
    if (cudaError_t e = sm90::launch_ordered_backward<kDType>(b, w, device, stream))
      return {"gradients of full attention", e};
    if (!b.forward.routing.route) return {};  // no other heads
  }
  if (runs_on_sm90(b.forward, device)) {
    if (dim <= 64) return run<sm90::BackwardKernels<kDType, 64>>(b, w, stream);
    if (dim <= 96) return run<sm90::BackwardKernels<kDType, 96>>(b, w, stream);
    if (dim <= 128) return run<sm90::BackwardKernels<kDType, 128>>(b, w, stream);
    return run<sm90::BackwardKernels<kDType, 256>>(b, w, stream);
  }
#endif
  if (dim <= 64) return run<sm80::BackwardKernels<kDType, 64>>(b, w, stream);
  if (dim <= 96) return run<sm80::BackwardKernels<kDType, 96>>(b, w, stream);
  if (dim <= 128) return run<sm80::BackwardKernels<kDType, 128>>(b, w, stream);
  return run<sm80::BackwardKernels<kDType, 256>>(b, w, stream);
}

}  // namespace

cudaError_t index_lists(const AttendParams& p, const BackwardWorkspace& w, cudaStream_t stream) {
  const int64_t words = int64_t(num_seq_heads(p)) * w.listed_blocks * w.listed_words;
  if (words == 0) return cudaSuccess;
  return launch(list_kernel, dim3(unsigned(ceil_div_64(words, kThreads / 32))), kThreads, 0, stream, false, p, w,
                words);
}

Status check_counts(const AttendBackwardParams& b) {
  const AttendParams& p = b.forward;
  if (int64_t(p.q.rows.capacity) * p.group() > INT_MAX - kMostRowsOfBlock)
    return {"q must have less than 2^31 rows times query heads of a KV head: split the batch", cudaSuccess};
  if (count_row_blocks(p, 1).most() * p.kv.num_heads > INT_MAX ||
      count_key_blocks(b, 1).most() * p.kv.num_heads > INT_MAX)
    return {"q and k must have less than 2^31 rows times heads: split the batch", cudaSuccess};
  return {};
}

// For head dimensions from 97 to 128, groups of 1, 2, 4 or 8, patterns without lists, and sequences in tensors of their
// own; where there are many more keys than queries, the blocks of keys would wait for each other. (Queries that q_begin
// and q_end leave out count here, as they are read on the device only: then it is slower than it could be.)
bool can_add_in_order([[maybe_unused]] const AttendBackwardParams& b) {
#ifdef FLUX_SM90
  const AttendParams& p = b.forward;
  Device device{};
  if (current_device(&device) != cudaSuccess || device.capability != 90) return false;
  const bool apart = p.batch == 1 || (p.lse_stride.b != 0 && b.grad_k.stride.b != 0);
  return p.head_dim > 96 && p.head_dim <= 128 && sm90::kOrderedGroup % p.group() == 0 && !p.routing.has_lists() &&
         apart && 2 * int64_t(p.q.max_len) >= p.kv.rows.capacity;
#else
  return false;
#endif
}

bool adds_in_order(const AttendBackwardParams& b) {
  const Routing& r = b.forward.routing;
  return (r.patterns[0].is_full() || (r.route && r.patterns[1].is_full())) && can_add_in_order(b);
}

Status attend_backward(const AttendBackwardParams& b, void* memory, cudaStream_t stream) {
  const AttendParams& p = b.forward;
  Device device{};
  if (const Status s = supported_device(p.dtype, &device); !s.ok()) return s;
  if (const Status s = check_counts(b); !s.ok()) return s;
  const BackwardWorkspace w = lay_out(b, adds_in_order(b), memory);
  if (cudaError_t e = index_lists(p, w, stream)) return {"index of the block lists", e};
  return p.dtype == DType::kFloat16 ? run<DType::kFloat16>(b, w, device, stream)
                                    : run<DType::kBFloat16>(b, w, device, stream);
}

}  // namespace flux::cuda
