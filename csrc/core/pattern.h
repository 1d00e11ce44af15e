// Which keys a query may see.
//
// Four integers describe full, streaming and triangle attention; a list of key blocks describes block-sparse attention.
// `visible` is the specification. All else here is derived from it, in forms that kernels can afford, and
// cpp_tests/pattern_test.cpp holds it to the specification: what one query sees (`visible_keys`), which key blocks a
// range of queries must visit (`kv_blocks`), and whether it sees all of a block (`TileMask`) or nothing of it
// (`sees_none`); and the other way round, which queries see any of a range of keys (`seeing_queries`), and which blocks
// of queries hold one (`query_blocks`). Queries are named by their position among the keys: query i of a sequence
// stands at kv_len - q_len + i, which is negative where there are more queries than keys.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace flux {

constexpr int32_t kUnlimited = 1 << 30;

FLUX_HD constexpr int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
FLUX_HD constexpr int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
FLUX_HD constexpr int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
FLUX_HD constexpr int64_t ceil_div_64(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What stands at [begin, end): rows of a tensor, tiles of a plan.
struct Span {
  int32_t begin, end;
  FLUX_HD int32_t size() const { return end - begin; }
};

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

  FLUX_HD bool is_full() const { return window >= kUnlimited; }  // but for lists of blocks
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

// What one query sees without a list, as bounds: keys [begin, last], and of those before `begin` the first `sink`.
struct VisibleKeys {
  int32_t begin = 0, last = -1, sink = 0;

  FLUX_HD bool contain(int32_t kv_pos) const { return kv_pos <= last && (kv_pos >= begin || kv_pos < sink); }
};

// A list does not narrow the bounds: kernels apply it by visiting its blocks alone. A negative position sees nothing.
FLUX_HD VisibleKeys visible_keys(const Pattern& p, int32_t q_pos, const Span& kv_rows, const BlockList& list) {
  VisibleKeys keys;
  keys.last = q_pos;
  if (list.blocks || q_pos < 0 || q_pos >= kv_rows.size() - p.last_q) return keys;
  keys.begin = p.window_begin(q_pos);
  keys.sink = p.sink;
  return keys;
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

// Queries that follow each other, and the keys of their sequence. (A TileView, schedule.h, is one too.)
struct QueryRange {
  Pattern pattern;
  BlockList list;
  Span kv_rows;
  int32_t q_pos, q_end;  // positions

  FLUX_HD int32_t q_pos_end() const { return q_end; }
};

// Which blocks of keys must be masked for such queries; what does not depend on the block, a division among it, is
// worked out once. (A template, so that of a TileView in shared memory nothing is read before it is needed.)
struct TileMask {
  int32_t first;         // position of the first query
  int32_t window_begin;  // of the query whose window starts last; low where no window hides anything
  int32_t sink;

  template <typename Range>
  FLUX_HD explicit TileMask(const Range& r) : first(r.q_pos), window_begin(-kUnlimited), sink(r.pattern.sink) {
    const int32_t last = min_of(r.q_pos_end(), r.kv_rows.size() - r.pattern.last_q) - 1;
    if (!r.list.blocks && last >= r.q_pos) window_begin = r.pattern.window_begin(last);
  }

  // False exactly when every query sees every key in [kv_begin, kv_end). The first term: at the diagonal, or past the
  // end of the keys.
  FLUX_HD bool operator()(int32_t kv_begin, int32_t kv_end) const {
    return kv_end - 1 > first || (kv_end > sink && max_of(kv_begin, sink) < window_begin);
  }
};

// True exactly when none of the queries sees any key in [kv_begin, kv_end). Where there is a list, the keys must lie in
// a listed block.
FLUX_HD bool sees_none(const QueryRange& r, int32_t kv_begin, int32_t kv_end) {
  if (kv_begin >= r.q_end) return true;
  if (r.list.blocks || kv_begin < r.pattern.sink || r.q_end > r.kv_rows.size() - r.pattern.last_q) return false;
  return kv_end <= r.pattern.window_begin(max_of(r.q_pos, 0));
}

// The queries at [q_begin, q_end) that see any key in [kv_begin, kv_end), as positions: those whose window or sink
// reaches the keys, and of the last `last_q` those behind them.
struct SeeingQueries {
  Span near, last;  // last.begin >= near.end
};

FLUX_HD SeeingQueries seeing_queries(const Pattern& p, int32_t kv_begin, int32_t kv_end, int32_t kv_len,
                                     int32_t q_begin, int32_t q_end) {
  kv_end = min_of(kv_end, kv_len);
  q_begin = max_of(q_begin, kv_begin);
  if (kv_begin >= kv_end || q_begin >= q_end) return {{q_end, q_end}, {q_end, q_end}};
  int32_t near_end = q_end;
  if (kv_begin >= p.sink && p.window < kUnlimited)  // window_begin(q) < kv_end, solved for q
    near_end = min_of(max_of((kv_end - 1 + p.window) / p.align * p.align, q_begin), q_end);
  return {{q_begin, near_end}, {min_of(max_of(near_end, kv_len - p.last_q), q_end), q_end}};
}

// Of each query block of the block lists (BlockTable::q_width queries), a bit: is a block of keys on its list?
struct ListedBits {
  const uint32_t* words = nullptr;  // null: no lists
  int32_t rows_each = 0;            // of rows, see QueryBlocks

  FLUX_HD bool operator[](int32_t entry) const { return words[entry / 32] >> entry % 32 & 1; }
  // No entry from this one to the end of its word.
  FLUX_HD bool none_left_of_word(int32_t entry) const { return words[entry / 32] >> entry % 32 == 0; }
};

// Ascending blocks of rows that hold a query which sees a range of keys. Row r of a sequence head is query r / group:
//
//   for (int32_t m = blocks.first(); m < blocks.end(); m = blocks.after(m)) ...
struct QueryBlocks {
  Span near{0, 0}, last{0, 0};  // blocks; last.begin >= near.end
  ListedBits listed;
  int32_t block = 1;  // rows of a block

  FLUX_HD int32_t end() const { return last.end; }
  FLUX_HD int32_t first() const { return from(near.begin); }
  FLUX_HD int32_t after(int32_t m) const { return from(m + 1); }

 private:
  // The first of them that is not before m.
  FLUX_HD int32_t from(int32_t m) const {
    if (!listed.words) return m < near.end || m >= last.begin ? m : last.begin;
    const int32_t blocks_each = listed.rows_each / block;
    int32_t entry = m / blocks_each;
    while (entry * blocks_each < last.end && !listed[entry])
      entry = listed.none_left_of_word(entry) ? (entry / 32 + 1) * 32 : entry + 1;
    return min_of(max_of(m, entry * blocks_each), last.end);
  }
};

// Of a sequence head's `q_len` queries, the first at `q_pos`. With lists (`listed`), the keys must lie in one of their
// blocks, the bits are that block's, and `block` divides `rows_each`.
FLUX_HD QueryBlocks query_blocks(const Pattern& p, int32_t kv_begin, int32_t kv_end, int32_t kv_len, int32_t q_pos,
                                 int32_t q_len, int32_t group, int32_t block, const ListedBits& listed = {}) {
  const SeeingQueries q = seeing_queries(listed.words ? Pattern{} : p, kv_begin, kv_end, kv_len, q_pos, q_pos + q_len);
  const auto blocks_of = [&](const Span& positions, int32_t none) {
    if (positions.size() == 0) return Span{none, none};
    return Span{(positions.begin - q_pos) * group / block, ceil_div((positions.end - q_pos) * group, block)};
  };
  QueryBlocks b;
  b.near = blocks_of(q.near, 0);
  b.last = blocks_of(q.last, b.near.end);
  b.last.begin = max_of(b.last.begin, b.near.end);
  b.listed = listed;
  b.block = block;
  return b;
}

}  // namespace flux
