// What the tests of the CUDA stages share: memory on the device, and cases of attention there.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <vector>

#include "attend_case.h"
#include "cuda/cuda.h"

namespace flux::cuda {

#define CUDA_OK(call) ASSERT_EQ(call, cudaSuccess)

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
  void* operator()(test::Data& d) { return (*this)(d.bytes.data(), d.bytes.size()); }
  template <typename T>
  T* operator()(const std::vector<T>& v) {
    return const_cast<T*>((*this)(v.data(), v.size()));
  }

 private:
  std::deque<DeviceArray<char>> arrays_;
};

// The forward call of `c` with all that it points to on the device.
inline AttendParams to_device(test::AttendCase& c, Copies& copy) {
  AttendParams p = c.params.forward;
  const test::Problem& host = c.problem;
  p.q.data = copy(c.q), p.kv.k.data = copy(c.k), p.kv.v.data = copy(c.v), p.out.data = copy(c.out), p.lse = copy(c.lse);
  if (p.kv.page_table) p.kv.page_table = copy(c.page_table);
  p.q.rows.begin = copy(host.q_begin), p.q.rows.end = copy(host.q_end);
  p.kv.rows.begin = copy(host.kv_begin), p.kv.rows.end = copy(host.kv_end);
  p.routing.route = copy(host.route);
  for (int mode = 0; mode < 2; ++mode)
    if (p.routing.blocks[mode].blocks)
      p.routing.blocks[mode].blocks = copy(host.blocks[mode]), p.routing.blocks[mode].counts = copy(host.counts[mode]);
  return p;
}

// Runs plan, attend and combine on `c`, and brings out and lse back.
inline void attend_on_device(test::AttendCase& c) {
  Copies copy;
  const AttendParams p = to_device(c, copy);
  AttendConfig config;
  const Status chosen = configure(p, &config);
  ASSERT_TRUE(chosen.ok()) << chosen.what;
  const DeviceArray<char> memory(std::vector<char>(lay_out(p, config, nullptr).bytes, char(0xff)));
  const Status done = attend(p, config, memory.get(), nullptr);
  ASSERT_TRUE(done.ok()) << done.what;
  Explanation e;
  ASSERT_TRUE(explain(p, &e).ok());
  EXPECT_EQ(e.family, config.instance->family);
  EXPECT_EQ(e.decode, most_rows(p) <= kDecodeRows && p.group() <= kDecodeRows);
  EXPECT_EQ(e.workers, config.num_workers);
  CUDA_OK(cudaDeviceSynchronize());
  c.lse = to_host(p.lse, c.lse.size());
  c.out.bytes = to_host(static_cast<unsigned char*>(p.out.data), c.out.bytes.size());
}

}  // namespace flux::cuda
