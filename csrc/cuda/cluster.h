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

// A barrier for all threads of the cluster; what they wrote before is visible after it.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#else
  __syncthreads();
#endif
}

// Stores to the same place in the shared memory of block `rank`.
__device__ inline void store_to(float* own_shared, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  const auto own = uint32_t(__cvta_generic_to_shared(own_shared));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#else
  *own_shared = value;
#endif
}

}  // namespace flux::cuda
