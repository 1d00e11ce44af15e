// csrc/cuda/cluster.h in C++.
#pragma once

#include <cuda_runtime.h>

namespace flux::cuda {

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive() { simt::arrive_cluster(); }
inline void cluster_wait() { simt::wait_cluster(); }

using Inbox = uint64_t;
inline void init_inbox(Inbox*) {}
inline void receive(Inbox* inbox, int bytes, uint32_t round) {
  if (threadIdx.x == 0) simt::expect_bytes(inbox, bytes);
  simt::wait_for_bytes(inbox, round & 1);
}

template <typename T>
T* in_block(const T* own, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(own) - simt::dynamic_shared(cluster_rank());
  return reinterpret_cast<T*>(simt::dynamic_shared(rank) + offset);
}
inline void send(float* own, int rank, float value, Inbox* inbox) {
  *in_block(own, rank) = value;
  simt::receive_bytes(in_block(inbox, rank), sizeof(float));
}
inline void send_to_others(const float* values, int32_t count, int rank, int log_blocks, Inbox* inbox) {
  for (int i = threadIdx.x; i < count << log_blocks; i += blockDim.x)
    if (const int to = i & ((1 << log_blocks) - 1); to != rank)
      send(const_cast<float*>(values) + (i >> log_blocks), to, values[i >> log_blocks], inbox);
}

}  // namespace flux::cuda
