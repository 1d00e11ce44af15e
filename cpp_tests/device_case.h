// Cases of attention on the device.
#pragma once

#include <gtest/gtest.h>

#include <vector>

#include "attend_case.h"
#include "cuda/cuda.h"
#include "on_device.h"

namespace flux::cuda {

using test::Copies;
using test::DeviceArray;
using test::has_gpu;
using test::to_host;

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
