// One token more in every row of a cache with fixed addresses, in one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/cuda.h"

namespace flux::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Word>
__device__ void copy(const void* from, void* to, int32_t bytes, int32_t thread, int32_t num_threads) {
  for (int32_t i = thread; i < bytes / int32_t(sizeof(Word)); i += num_threads)
    static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
}

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

// Element `index` and the head_dim - 1 after it, to token `slot` of the pool.
__device__ void store_token(const AppendParams& p, const void* x, DType dtype, int64_t index, void* pool, int64_t slot,
                            int32_t thread, int32_t num_threads) {
  const int32_t bytes = p.head_dim * size_of(p.pool_dtype);
  const void* from = static_cast<const char*>(x) + index * size_of(dtype);
  void* to = static_cast<char*>(pool) + slot * bytes;
  if (dtype != p.pool_dtype) {
    for (int32_t i = thread; i < p.head_dim; i += num_threads) store(to, p.pool_dtype, i, load(from, dtype, i));
  } else if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | uintptr_t(bytes)) % 16 == 0) {
    copy<uint4>(from, to, bytes, thread, num_threads);
  } else {
    copy<uint16_t>(from, to, bytes, thread, num_threads);
  }
}

// One block per row, and no block reads what another writes: a row has its own count of tokens, its own run of pages
// and its own line of the table; `slots` is read by the one thread that counts it up. So blocks need no order. Within a
// block, all threads read `seen` before the barrier and one writes it after.
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  const int32_t row = blockIdx.x, thread = threadIdx.x;
  const AppendRow r(p, row);
  __syncthreads();
  const int64_t b = row / p.num_kv_heads, h = row % p.num_kv_heads, slot = r.slot();
  constexpr int32_t kHalf = kThreads / 2;
  if (thread < kHalf)
    store_token(p, p.k, p.k_dtype, b * p.k_stride.b + h * p.k_stride.h, p.k_pool, slot, thread, kHalf);
  else
    store_token(p, p.v, p.v_dtype, b * p.v_stride.b + h * p.v_stride.h, p.v_pool, slot, thread - kHalf, kHalf);
  int32_t* table = p.page_table + int64_t(row) * p.max_pages;
  for (int32_t i = thread; i < r.num_columns(); i += kThreads) table[i] = r.column(i);
  if (thread == 0) {
    p.kv_len[row] = r.kv_len();
    ++p.seen[row];
    if (row == 0) ++*p.slots;
  }
}

}  // namespace

cudaError_t append(const AppendParams& p, cudaStream_t stream) {
  append_kernel<<<p.num_rows(), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace flux::cuda
