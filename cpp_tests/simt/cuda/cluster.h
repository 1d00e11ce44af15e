// csrc/cuda/cluster.h in C++.
#pragma once

#include <cuda_runtime.h>

namespace flux::cuda {

inline int cluster_rank() { return simt::cluster_rank(); }
inline int cluster_size() { return simt::cluster_size(); }
inline void cluster_arrive() { simt::arrive_cluster(); }
inline void cluster_wait() { simt::wait_cluster(); }
inline void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

inline float* in_block(const float* own_shared, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(own_shared) - simt::dynamic_shared(cluster_rank());
  return reinterpret_cast<float*>(simt::dynamic_shared(rank) + offset);
}
inline void send_to_all(const float* values, float* to, int32_t count, int blocks) {
  for (int i = threadIdx.x; i < count * blocks; i += blockDim.x)
    in_block(to + i / blocks, i % blocks)[0] = values[i / blocks];
}

}  // namespace flux::cuda
