// csrc/cuda/cluster.h in C++.
#pragma once

#include <cuda_runtime.h>

namespace flux::cuda {

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive() { simt::arrive_cluster(); }
inline void cluster_arrive_relaxed() { simt::arrive_cluster(); }
inline void cluster_wait() { simt::wait_cluster(); }
inline void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

inline float* in_block(const float* own, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(own) - simt::dynamic_shared(cluster_rank());
  return reinterpret_cast<float*>(simt::dynamic_shared(rank) + offset);
}
inline void store_in_block(float* own, int rank, float value) { *in_block(own, rank) = value; }
inline void send_to_others(const float* values, int32_t count, int rank, int log_blocks) {
  for (int i = threadIdx.x; i < count << log_blocks; i += blockDim.x)
    if (const int to = i & ((1 << log_blocks) - 1); to != rank)
      *in_block(values + (i >> log_blocks), to) = values[i >> log_blocks];
}

}  // namespace flux::cuda
