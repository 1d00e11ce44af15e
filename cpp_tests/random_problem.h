// Random patterns, lists and batches, the same on every machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "core/params.h"
#include "core/pattern.h"

namespace flux::test {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  // Uniform in [lo, hi]. (Not std::uniform_int_distribution: its values differ between standard libraries.)
  int32_t integer(int32_t lo, int32_t hi) { return lo + int32_t(engine_() % uint32_t(hi - lo + 1)); }
  bool chance(int32_t percent) { return integer(1, 100) <= percent; }
  // Roughly normal: mean 0, variance 1.
  float normal() {
    float sum = 0.f;
    for (int i = 0; i < 12; ++i) sum += float(engine_() >> 8) * 0x1p-24f;
    return sum - 6.f;
  }

 private:
  std::mt19937 engine_;
};

inline Pattern random_pattern(Random& random) {
  Pattern p;
  switch (random.integer(0, 3)) {
    case 0:
      return p;  // full
    case 1:      // streaming, token-exact
      p.sink = random.integer(0, 40);
      p.window = random.integer(1, 90);
      return p;
    case 2:  // streaming, block-aligned
      p.align = 1 << random.integer(1, 5);
      p.sink = p.align * random.integer(0, 3);
      p.window = p.align * random.integer(1, 5);
      return p;
    default:  // triangle
      p.align = random.chance(50) ? 1 : 16;
      p.sink = random.integer(0, 40);
      p.window = p.align * random.integer(1, 5);
      p.last_q = random.integer(1, 60);
      return p;
  }
}

// An ascending list of blocks that start at or before `last_pos`, the diagonal among them most of the time.
inline std::vector<int32_t> random_blocks(Random& random, int32_t last_pos, int32_t width) {
  std::vector<int32_t> blocks;
  if (last_pos < 0) return blocks;
  const int32_t density = random.integer(5, 95);
  for (int32_t b = 0; b <= last_pos / width; ++b)
    if (random.chance(density) || (b == last_pos / width && random.chance(80))) blocks.push_back(b);
  return blocks;
}

// A ragged batch and the memory its parameters point to.
struct Problem {
  AttendParams params;  // sizes, bounds and routing
  std::vector<int32_t> q_begin, q_end, kv_begin, kv_end, route;
  std::vector<int32_t> blocks[2], counts[2];
};

struct ProblemOptions {
  int32_t max_batch = 4, min_q_len = 1, max_q_len = 300, max_kv_len = 400;
  int32_t max_kv_heads = 3, max_group = 5;
  bool packed = false;  // rows of q and k follow one another; else each sequence has its own
  bool per_head_lengths = false;
  bool block_lists = false;
};

// Fills `out` (whose vectors must then stay where they are).
inline void random_problem(Random& random, const ProblemOptions& o, Problem& out) {
  AttendParams& p = out.params;
  p.batch = random.integer(1, o.max_batch);
  p.kv.num_heads = random.integer(1, o.max_kv_heads);
  p.q.num_heads = p.kv.num_heads * random.integer(1, o.max_group);
  int32_t q_at = 0, kv_at = 0;
  for (int32_t b = 0; b < p.batch; ++b) {
    const bool decode = o.min_q_len == 1 && random.chance(30);
    const int32_t q_len = random.chance(10) ? 0
                          : decode          ? random.integer(1, 4)
                                            : random.integer(o.min_q_len, o.max_q_len);
    out.q_begin.push_back(o.packed ? q_at : random.chance(30) ? random.integer(0, 5) : 0);
    out.q_end.push_back(out.q_begin.back() + q_len);
    q_at = out.q_end.back();
    p.q.max_len = max_of(p.q.max_len, q_len);
    p.q.total_rows += q_len;
    p.q.rows.capacity = max_of(p.q.rows.capacity, q_at);
    for (int32_t h = 0; h < (o.per_head_lengths ? p.kv.num_heads : 1); ++h) {
      const int32_t kv_len = random.chance(10) ? 0 : random.chance(40) ? q_len : random.integer(1, o.max_kv_len);
      out.kv_begin.push_back(o.packed ? kv_at : random.chance(30) ? random.integer(0, 5) : 0);
      out.kv_end.push_back(out.kv_begin.back() + kv_len);
      kv_at = out.kv_end.back();
      p.kv.rows.capacity = max_of(p.kv.rows.capacity, kv_at);
    }
    for (int32_t h = 0; h < p.kv.num_heads; ++h) out.route.push_back(random.integer(0, 1));
  }
  p.q.rows.begin = out.q_begin.data();
  p.q.rows.end = out.q_end.data();
  p.kv.rows.begin = out.kv_begin.data();
  p.kv.rows.end = out.kv_end.data();
  if (o.per_head_lengths) {
    p.kv.rows.begin_stride_b = p.kv.rows.end_stride_b = p.kv.num_heads;
    p.kv.rows.begin_stride_h = p.kv.rows.end_stride_h = 1;
  }
  p.routing.route = out.route.data();
  p.routing.stride_b = p.kv.num_heads;
  p.routing.stride_h = 1;
  for (int mode = 0; mode < 2; ++mode) {
    p.routing.patterns[mode] = random_pattern(random);
    if (!o.block_lists || random.chance(30)) continue;
    p.routing.patterns[mode] = {};
    BlockTable& t = p.routing.blocks[mode];
    t.kv_width = random.chance(50) ? 64 : 128;
    t.q_blocks = max_of(ceil_div(p.q.max_len, t.q_width), 1);
    t.max_count = ceil_div(p.kv.rows.capacity, t.kv_width) + 1;
    out.blocks[mode].assign(size_t(p.batch) * p.kv.num_heads * t.q_blocks * t.max_count, -7);
    out.counts[mode].assign(size_t(p.batch) * p.kv.num_heads * t.q_blocks, 0);
    for (int32_t b = 0; b < p.batch; ++b)
      for (int32_t h = 0; h < p.kv.num_heads; ++h) {
        const int32_t q_len = p.q.rows(b, h).size(), kv_len = p.kv.rows(b, h).size();
        for (int32_t m = 0; m * t.q_width < q_len; ++m) {
          const int32_t last_pos = kv_len - q_len + min_of((m + 1) * t.q_width, q_len) - 1;
          const std::vector<int32_t> list = random_blocks(random, last_pos, t.kv_width);
          const size_t i = (size_t(b) * p.kv.num_heads + h) * t.q_blocks + m;
          out.counts[mode][i] = int32_t(list.size());
          std::copy(list.begin(), list.end(), out.blocks[mode].begin() + i * t.max_count);
        }
      }
    t.blocks = out.blocks[mode].data();
    t.counts = out.counts[mode].data();
  }
}

}  // namespace flux::test
