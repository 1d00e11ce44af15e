// Memory of the device, for tests of the CUDA stages. (Without a GPU it is the host's, see simt/cuda_runtime.h.)
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <vector>

#include "attend_case.h"

#define CUDA_OK(call) ASSERT_EQ(call, cudaSuccess)

namespace flux::test {

inline bool has_gpu() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) {
    EXPECT_EQ(cudaMalloc(&data_, std::max<size_t>(host.size(), 1) * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

template <typename T>
std::vector<T> to_host(const T* device, size_t count) {
  std::vector<T> host(count);
  EXPECT_EQ(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return host;
}

// Copies on the device of what parameters point to.
class Copies {
 public:
  template <typename T>
  T* operator()(T* host, size_t count) {
    if (!host) return nullptr;
    const auto* bytes = reinterpret_cast<const char*>(host);
    arrays_.emplace_back(std::vector<char>(bytes, bytes + count * sizeof(T)));
    return reinterpret_cast<T*>(arrays_.back().get());
  }
  void* operator()(Data& d) { return (*this)(d.bytes.data(), d.bytes.size()); }
  template <typename T>
  T* operator()(const std::vector<T>& v) {
    return const_cast<T*>((*this)(v.data(), v.size()));
  }

 private:
  std::deque<DeviceArray<char>> arrays_;
};

}  // namespace flux::test
