// CUDA for tests without a GPU: what the kernels of csrc/cuda need, on one thread of the host.
//
// Every CUDA thread is a fiber; it runs until it meets a barrier (of its warp, block or cluster), then another one goes
// on, picked at random but alike in every run. Blocks follow one another in random order, those of a cluster run
// together. Dynamic shared memory starts full of NaN. What is missing: two threads never run at once, so a missing
// fence goes unseen (a missing barrier does not: the order of threads is random), and the host's arithmetic is not the
// device's to the last bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>

// ---- language ----

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
using std::max;
using std::min;

// ---- the machine ----

namespace simt {

constexpr int kWarpSize = 32;

// The thread that runs; see machine.cpp.
int lane();
unsigned char* dynamic_shared(int rank);  // of a block of the cluster
int cluster_rank();
int cluster_size();

void sync_warp();
void sync_block();
void arrive_cluster();
void wait_cluster();

// A barrier in shared memory that counts bytes: whoever waits goes on as soon as a phase other than `parity` has begun.
void expect_bytes(const void* barrier, int bytes);  // once in each phase
void receive_bytes(const void* barrier, int bytes);
void wait_for_bytes(const void* barrier, unsigned parity);

// The value of every lane; null for those that have left the kernel. Valid until the lane's next exchange.
const void* const* exchange(const void* mine, size_t bytes);

template <typename T>
T from_lane(T mine, int lane) {
  const void* const* all = exchange(&mine, sizeof(T));
  T value = mine;
  if (all[lane & 31]) std::memcpy(&value, all[lane & 31], sizeof(T));
  return value;
}
template <typename T, typename Result, typename Fold>
Result over_lanes(T mine, Result start, Fold fold) {
  const void* const* all = exchange(&mine, sizeof(T));
  for (int l = 0; l < kWarpSize; ++l) {
    T value;
    if (!all[l]) continue;
    std::memcpy(&value, all[l], sizeof(T));
    start = fold(start, value, l);
  }
  return start;
}

// What the machine pretends to be: a small Ampere, or a Hopper. Host code may remember what it asked, so each has an
// index.
struct DeviceModel {
  int index, capability, ptx_version, num_sms, blocks_per_sm, shared_bytes;
};
constexpr DeviceModel kAmpere{0, 80, 80, 5, 2, 99 * 1024}, kHopper{1, 90, 90, 132, 2, 227 * 1024};
extern DeviceModel device;

void run_grid(dim3 grid, dim3 block, int cluster, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace simt

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // as for the thread that runs

// ---- intrinsics ----

inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { simt::sync_warp(); }
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  return simt::from_lane(x, lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int by) {
  return simt::from_lane(x, simt::lane() >= by ? simt::lane() - by : simt::lane());
}
template <typename T>
T __shfl_down_sync(unsigned, T x, int by) {
  return simt::from_lane(x, simt::lane() + by < simt::kWarpSize ? simt::lane() + by : simt::lane());
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return simt::from_lane(x, simt::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return simt::over_lanes(x, 0u, [](unsigned sum, bool y, int l) { return sum | unsigned(y) << l; });
}
template <typename T>
T __reduce_add_sync(unsigned, T x) {
  return simt::over_lanes(x, T(0), [](T a, T b, int) { return T(a + b); });
}
template <typename T>
T __reduce_max_sync(unsigned, T x) {
  return simt::over_lanes(x, x, [](T a, T b, int) { return std::max(a, b); });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
T atomicAdd(T* at, T x) {
  const T old = *at;
  *at += x;
  return old;
}
template <typename T>
T atomicMax(T* at, T x) {
  const T old = *at;
  *at = std::max(old, x);
  return old;
}
inline void __threadfence() {}

// ---- host ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = simt::device.index, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = simt::device.capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = simt::device.capability % 10, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = simt::device.num_sms, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = simt::device.shared_bytes, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, Kernel) {
  return a->ptxVersion = simt::device.ptx_version, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = simt::device.blocks_per_sm, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  return *clusters = simt::device.num_sms / int(config->attrs[0].val.clusterDim.x), cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** at, size_t bytes) {
  return *at = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256)), cudaSuccess;
}
inline cudaError_t cudaFree(void* at) { return std::free(at), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Params...), const Args&... args) {
  if (c->gridDim.x == 0 || c->gridDim.y == 0 || c->gridDim.z == 0) return cudaErrorInvalidValue;
  int cluster = 1;
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = int(c->attrs[i].val.clusterDim.x);
  if (c->gridDim.x % cluster) return cudaErrorInvalidValue;
  const std::tuple<Params...> values(args...);
  simt::run_grid(c->gridDim, c->blockDim, cluster, c->dynamicSmemBytes, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
