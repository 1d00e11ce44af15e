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

// A barrier for all threads of the cluster, in two halves; what they wrote before is visible after it. For that an
// arriving thread waits until all its writes are done, those to global memory too: better make them after it.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The first half where nothing has been written yet.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
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

// Writes to the place of `own` in the shared memory of block `rank`.
__device__ inline void store_in_block(float* own, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in(own, rank)), "f"(value) : "memory");
#else
  *own = value;
#endif
}

// Copies `count` floats of this block's shared memory (a multiple of 4, 16-byte aligned) to the same place in all other
// blocks. Every thread takes part: a warp has one receiver, so that its stores are neighbours. `log_blocks` at most 4,
// at least 16 warps.
__device__ inline void send_to_others(const float* values, int32_t count, int rank, int log_blocks) {
#if __CUDA_ARCH__ >= 900
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int to = warp & ((1 << log_blocks) - 1), part = warp >> log_blocks, parts = (blockDim.x / 32) >> log_blocks;
  if (to == rank) return;
  const auto* from = reinterpret_cast<const float4*>(values);
  const uint32_t there = address_in(values, to);
  for (int i = 32 * part + lane; i < count / 4; i += 32 * parts) {
    const float4 x = from[i];
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there + 16 * i), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w)
                 : "memory");
  }
#endif
}

}  // namespace flux::cuda
