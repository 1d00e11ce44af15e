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

// A barrier for all threads of the cluster, in two halves: every block has started, and what `init_inbox` wrote is
// there.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
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

// Counts the bytes that others store into this block (an mbarrier). So an exchange needs neither a barrier of all
// blocks nor the fence in front of it, which is one of the whole GPU (`MEMBAR.ALL.GPU`).
using Inbox = uint64_t;

// By one thread, before its cluster_arrive.
__device__ inline void init_inbox(Inbox* inbox) {
#if __CUDA_ARCH__ >= 900
  const auto at = uint32_t(__cvta_generic_to_shared(inbox));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(at) : "memory");
#endif
}

// All threads wait until `bytes` more have come. `round`: how many times that has been done before.
__device__ inline void receive(Inbox* inbox, int bytes, uint32_t round) {
#if __CUDA_ARCH__ >= 900
  const auto at = uint32_t(__cvta_generic_to_shared(inbox));
  if (threadIdx.x == 0)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}" ::"r"(at),
      "r"(round & 1)
      : "memory");
#else
  __syncthreads();
#endif
}

#if __CUDA_ARCH__ >= 900
__device__ inline uint32_t address_in(const void* own_shared, int rank) {
  const auto own = uint32_t(__cvta_generic_to_shared(own_shared));
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  return there;
}
#endif

// Writes to the place of `own` in the shared memory of block `rank`, which may be this one, and counts in its inbox.
__device__ inline void send(float* own, int rank, float value, Inbox* inbox) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address_in(own, rank)),
               "f"(value), "r"(address_in(inbox, rank))
               : "memory");
#else
  *own = value;
#endif
}

// Copies `count` floats of this block's shared memory (a multiple of 4, 16-byte aligned) to the same place in all other
// blocks, counted in their inboxes. Every thread takes part: a warp has one receiver, so that its stores are
// neighbours. `log_blocks` at most 4, at least 16 warps.
__device__ inline void send_to_others(const float* values, int32_t count, int rank, int log_blocks, Inbox* inbox) {
#if __CUDA_ARCH__ >= 900
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int to = warp & ((1 << log_blocks) - 1), part = warp >> log_blocks, parts = (blockDim.x / 32) >> log_blocks;
  if (to == rank) return;
  const auto* from = reinterpret_cast<const float4*>(values);
  const uint32_t there = address_in(values, to), inbox_there = address_in(inbox, to);
  for (int i = 32 * part + lane; i < count / 4; i += 32 * parts) {
    const float4 x = from[i];
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     there + 16 * i),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(inbox_there)
                 : "memory");
  }
#endif
}

}  // namespace flux::cuda
