// One more token for every sequence head of a cache with fixed addresses, in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"

namespace flux::cuda {
namespace {

constexpr int32_t kThreads = 256, kHalf = kThreads / 2;

__device__ float load(const void* x, DType dtype, int32_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(x)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(x)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i]);
}

__device__ void store(void* x, DType dtype, int32_t i, float value) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(x)[i] = value;
  else if (dtype == DType::kFloat16)
    static_cast<__half*>(x)[i] = __float2half_rn(value);
  else
    static_cast<__nv_bfloat16*>(x)[i] = __float2bfloat16_rn(value);
}

__device__ int32_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// By threads 0 .. kHalf - 1. A token is at most 64 times 16 bytes, so nothing is gained by unrolling.
template <typename Word>
__device__ void copy(const void* from, void* to, int32_t bytes, int32_t thread) {
#pragma unroll 1
  for (int32_t i = thread; i < bytes / int32_t(sizeof(Word)); i += kHalf)
    static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
}

__device__ void convert(const void* from, DType from_dtype, void* to, DType to_dtype, int32_t dim, int32_t thread) {
#pragma unroll 1
  for (int32_t i = thread; i < dim; i += kHalf) store(to, to_dtype, i, load(from, from_dtype, i));
}

__device__ void fill_nan(void* to, DType dtype, int32_t dim, int32_t thread) {
#pragma unroll 1
  for (int32_t i = thread; i < dim; i += kHalf) {
    if (dtype == DType::kFloat32)
      static_cast<uint32_t*>(to)[i] = quiet_nan(dtype);
    else
      static_cast<uint16_t*>(to)[i] = uint16_t(quiet_nan(dtype));
  }
}

// One block per sequence head, and no block reads what another writes: each has its own count of tokens, its own run of
// pages and its own line of the table; `slots` is read by the one thread that counts it up. So blocks need no order.
// Within a block, all threads read `seen` before the barrier and one writes it after.
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  let_next_start();  // an attend or plan kernel, which waits for the end of this one before it reads anything
  const int32_t seq_head = blockIdx.x, thread = threadIdx.x;
  const AppendStep step(p, seq_head);
  if (!step.active) {
    if (seq_head == 0 && thread == 0) ++*p.slots;
    return;
  }

  // Half the threads store the key, half the value.
  const bool is_k = thread < kHalf;
  const int32_t b = seq_head / p.num_kv_heads, h = seq_head % p.num_kv_heads;
  const int64_t index = is_k ? b * p.k_stride.b + h * p.k_stride.h : b * p.v_stride.b + h * p.v_stride.h;
  const DType dtype = is_k ? p.k_dtype : p.v_dtype;
  const int32_t bytes = p.head_dim * size_of(p.pool_dtype);
  const void* from = static_cast<const char*>(is_k ? p.k : p.v) + index * size_of(dtype);
  void* to = static_cast<char*>(is_k ? p.k_pool : p.v_pool) + step.slot() * bytes;
  const uintptr_t both = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  if (step.nan)
    fill_nan(to, p.pool_dtype, p.head_dim, thread % kHalf);
  else if (dtype != p.pool_dtype)
    convert(from, dtype, to, p.pool_dtype, p.head_dim, thread % kHalf);
  else if ((both | uintptr_t(bytes)) % 16 == 0)
    copy<uint4>(from, to, bytes, thread % kHalf);
  else
    copy<uint16_t>(from, to, bytes, thread % kHalf);

  int32_t* table = p.page_table + int64_t(seq_head) * p.max_pages;
  for (int32_t i = thread; i < step.num_columns(); i += kThreads) table[i] = step.column(i);

  __syncthreads();
  if (thread == 0) {
    p.kv_len[seq_head] = step.kv_len();
    ++p.seen[seq_head];
    if (seq_head == 0) ++*p.slots;
  }
}

}  // namespace

cudaError_t append(const AppendParams& p, cudaStream_t stream) {
  return launch(append_kernel, p.num_seq_heads(), kThreads, 0, stream, false, p);
}

}  // namespace flux::cuda
