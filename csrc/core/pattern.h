// Which keys a query may see.
//
// Four integers describe full, streaming and triangle attention; a list of key blocks describes
// block-sparse attention. `visible` is the specification. `kv_blocks` (what a tile must visit) and
// `needs_mask` (whether a visited block must be masked) are derived from it, and cpp_tests/pattern_test.cpp
// holds them to it. A tile is a range of query positions, in key coordinates: query i of a sequence
// stands at position kv_len - q_len + i, which is negative where there are more queries than keys.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace flux {

constexpr int32_t kUnlimited = 1 << 30;

FLUX_HD constexpr int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
FLUX_HD constexpr int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
FLUX_HD constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
FLUX_HD constexpr int64_t ceil_div_64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The key blocks one query block may see, ascending, `width` keys each. No list: every block.
struct BlockList {
  const int32_t* blocks = nullptr;
  int32_t count = 0;
  int32_t width = 0;
};

struct Pattern {
  int32_t sink = 0;             // the first `sink` keys are visible to every query
  int32_t window = kUnlimited;  // the last `window` keys, the query's own included, up to alignment
  int32_t last_q = 0;           // the last `last_q` queries see every earlier key
  int32_t align = 1;            // the window starts at a multiple of `align`; divides `window`

  // First key inside the window of a query at q_pos >= 0 (may be negative).
  FLUX_HD int32_t window_begin(int32_t q_pos) const {
    return int32_t(uint32_t(align) * (uint32_t(q_pos) / uint32_t(align) + 1)) - window;  // unsigned: fewer instructions
  }
};

// The specification: does the query at q_pos see the key at kv_pos?
FLUX_HD bool visible(const Pattern& p, int32_t q_pos, int32_t kv_pos, int32_t kv_len, const BlockList& list = {}) {
  if (kv_pos > q_pos) return false;
  if (list.blocks) {
    for (int32_t i = 0; i < list.count; ++i)
      if (list.blocks[i] == kv_pos / list.width) return true;
    return false;
  }
  return kv_pos < p.sink || kv_pos >= p.window_begin(q_pos) || q_pos >= kv_len - p.last_q;
}

// The key blocks a tile visits, in ascending order: a run from the start (the sink), then a run up to
// the diagonal (the window); or the entries of a list, each cut into `per_entry` kernel blocks.
struct KvBlocks {
  int32_t sink_count = 0;
  int32_t window_begin = 0;
  int32_t window_count = 0;
  const int32_t* list = nullptr;
  int32_t per_entry = 1;

  FLUX_HD int32_t size() const { return sink_count + window_count; }
  FLUX_HD int32_t operator[](int32_t i) const {
    if (list) return list[i / per_entry] * per_entry + i % per_entry;
    return i < sink_count ? i : window_begin + (i - sink_count);
  }
};

// Is kernel block `block` one of them?
FLUX_HD bool contains(const KvBlocks& b, int32_t block) {
  if (!b.list) return block < b.sink_count || (block >= b.window_begin && block < b.window_begin + b.window_count);
  int32_t lo = 0, hi = b.window_count;  // the first entry >= block
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (b[mid] < block)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo < b.window_count && b[lo] == block;
}

// Blocks of `block` keys that hold at least one key visible to a query in [q_begin, q_end).
// `list.width` must be a multiple of `block`. A list may reach past the diagonal of the tile: it belongs to a query
// block that can hold several tiles.
FLUX_HD KvBlocks kv_blocks(const Pattern& p, int32_t q_begin, int32_t q_end, int32_t kv_len, int32_t block,
                           const BlockList& list = {}) {
  KvBlocks b;
  if (q_end <= 0 || q_end <= q_begin) return b;  // before the first key; no query
  q_begin = max_of(q_begin, 0);
  const int32_t end = ceil_div(q_end, block);
  if (list.blocks) {
    b.list = list.blocks;
    b.per_entry = list.width / block;
    int32_t count = list.count;
    while (count > 0 && list.blocks[count - 1] * b.per_entry >= end) --count;
    b.window_count = count * b.per_entry;
    if (count > 0) b.window_count -= max_of((list.blocks[count - 1] + 1) * b.per_entry - end, 0);
    return b;
  }
  const bool reaches_last_q = q_end > kv_len - p.last_q;
  b.window_begin = reaches_last_q ? 0 : max_of(p.window_begin(q_begin), 0) / block;
  b.window_count = end - b.window_begin;
  b.sink_count = min_of(ceil_div(min_of(p.sink, q_end), block), b.window_begin);
  return b;
}

// False exactly when every query in [q_begin, q_end) sees every key in [kv_begin, kv_end).
FLUX_HD bool needs_mask(const Pattern& p, int32_t q_begin, int32_t q_end, int32_t kv_begin, int32_t kv_end,
                        int32_t kv_len, const BlockList& list = {}) {
  if (kv_end - 1 > q_begin) return true;  // the diagonal, or the end of the keys
  if (list.blocks || kv_end <= p.sink) return false;
  const int32_t last = min_of(q_end, kv_len - p.last_q) - 1;  // the window of this query starts last
  return last >= q_begin && max_of(kv_begin, p.sink) < p.window_begin(last);
}

}  // namespace flux
