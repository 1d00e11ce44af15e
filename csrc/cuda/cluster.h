// Blocks of a cluster that read and write each other's shared memory (compute capability 9.0); a lone block elsewhere.
#pragma once

#include <cstdint>

namespace flux::cuda {

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return int(r);
#else
  return 0;
#endif
}

__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return int(n);
#else
  return 1;
#endif
}

// A barrier for all threads of the cluster, in two halves; what they wrote before is visible after it.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
__device__ inline void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

#if __CUDA_ARCH__ >= 900
__device__ inline uint32_t address_in(const float* own_shared, int rank) {
  const auto own = uint32_t(__cvta_generic_to_shared(own_shared));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  return there;
}
#endif

// Copies `count` floats of this block's shared memory to `to` in the shared memory of every block. Every thread takes
// part. What crosses between multiprocessors are packets, so floats travel by fours where they can.
__device__ inline void send_to_all(const float* values, float* to, int32_t count, int blocks) {
#if __CUDA_ARCH__ >= 900
  if (count % 4 == 0 && __cvta_generic_to_shared(to) % 16 == 0 && __cvta_generic_to_shared(values) % 16 == 0) {
    for (int i = threadIdx.x; i < count / 4 * blocks; i += blockDim.x) {
      const int at = i / blocks * 4;
      const float4 x = *reinterpret_cast<const float4*>(values + at);
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address_in(to + at, i % blocks)), "f"(x.x),
                   "f"(x.y), "f"(x.z), "f"(x.w)
                   : "memory");
    }
    return;
  }
  for (int i = threadIdx.x; i < count * blocks; i += blockDim.x)
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in(to + i / blocks, i % blocks)),
                 "f"(values[i / blocks])
                 : "memory");
#else
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = values[i];
#endif
}

}  // namespace flux::cuda
