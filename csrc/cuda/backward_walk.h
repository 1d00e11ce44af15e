// What a block of a gradient kernel visits, one after the other, and with which numbers of every row: of hard routes
// the blocks that the rows or keys see, or are seen by; of a mixture's, twice these (mix_backward.h).
#pragma once

#include "cuda/backward.h"

namespace flux::cuda {

struct HardWalks {
  using Params = AttendBackwardParams;
  using Workspace = BackwardWorkspace;

  // Of a block that owns rows: blocks of keys.
  template <typename T>
  struct OfRows {
    using Row = OwnedRow<T>;
    // Where in the walk a block stands, as far as the numbers of a row depend on it.
    struct Place {};
    TileView rows;

    __device__ OfRows(const TileView& rows, int32_t) : rows(rows) {}
    __device__ const TileView& view() const { return rows; }
    __device__ int32_t size() const { return rows.blocks.size(); }
    __device__ int32_t operator[](int32_t i) const { return rows.blocks[i]; }
    __device__ Place place(int32_t) const { return {}; }
    __device__ TileMask mask() const { return rows.mask(); }
    __device__ bool needs_mask(const TileMask& mask, Place, int32_t kv_begin, int32_t kv_end) const {
      return mask(kv_begin, kv_end);
    }
    __device__ float lse(const Row& row, Place) const { return row.lse; }
    __device__ float delta(const Row& row, Place) const { return row.delta; }
    // What a row sees: as it is known of one, and of a query.
    __device__ const VisibleKeys& keys(const Row& row, Place) const { return row.keys; }
    __device__ VisibleKeys visible_keys(int32_t token, Place) const { return rows.visible_keys(token); }
  };

  // Of a block that owns keys: blocks of rows, all of them.
  struct AllRows {
    __device__ int32_t operator[](int32_t i) const { return i; }
    // Where the numbers of the rows stand, and what a query among them sees.
    __device__ const BackwardWorkspace& numbers(const BackwardWorkspace& w, int32_t) const { return w; }
    __device__ VisibleKeys visible_keys(const TileView& seq_head, int32_t token, int32_t) const {
      return seq_head.visible_keys(token);
    }
    // Must any pair of the owned keys and the rows [first, end) be hidden?
    __device__ bool needs_mask(const AttendParams& p, const TileView& seq_head, const Span& keys, int32_t,
                               int32_t first, int32_t end) const {
      const QueryRange queries{seq_head.pattern, seq_head.list, seq_head.kv_rows, seq_head.q_pos + first / p.group(),
                               seq_head.q_pos + ceil_div(min_of(end, seq_head.q_rows.size() * p.group()), p.group())};
      return TileMask(queries)(keys.begin, keys.end);
    }
  };

  // Those that see any of the keys, by numbers that ascend.
  struct OfKeys : AllRows {
    QueryBlocks blocks;
    bool hides_only_later_keys;

    __device__ OfKeys(const AttendParams& p, const BackwardWorkspace& w, const TileView& seq_head, const Span& keys,
                      int32_t block)
        : blocks(blocks_seeing(p, w, seq_head, keys, block)), hides_only_later_keys(seq_head.hides_only_later_keys()) {}
    __device__ int32_t first() const { return blocks.first(); }
    __device__ int32_t after(int32_t i) const { return blocks.after(i); }
    __device__ int32_t end() const { return blocks.end(); }
    // As needs_mask without a division, of `rows` rows that are whole queries.
    __device__ bool needs_mask_of_queries(const TileView& seq_head, const Span& keys, int32_t, const Span& queries,
                                          int32_t) const {
      const int32_t q_pos = seq_head.q_pos + queries.begin;
      if (keys.end - 1 > q_pos || hides_only_later_keys) return keys.end - 1 > q_pos;
      const QueryRange range{seq_head.pattern, seq_head.list, seq_head.kv_rows, q_pos,
                             min_of(seq_head.q_pos + queries.end, seq_head.q_pos_end())};
      return TileMask(range)(keys.begin, keys.end);
    }
  };
};

// Brings what is known of the kRows rows that a walk comes to at `at`; by kRows threads or more. What it copies belongs
// to the thread's group of copies under way.
template <int kRows, typename Walk, typename Params, typename Workspace>
__device__ void load_visited_rows(const Params& b, const Workspace& w, const TileView& seq_head, const Walk& walk,
                                  const Span& owned_keys, int32_t at, VisitedRows<kRows>& rows) {
  const AttendParams& p = b.forward;
  const int32_t i = threadIdx.x, first = walk[at] * kRows, row = first + i;
  if (i >= kRows) return;
  const bool needs_mask = walk.needs_mask(p, seq_head, owned_keys, at, first, first + kRows);
  if (i == 0) rows.needs_mask = needs_mask;
  if (row < seq_head.q_rows.size() * p.group()) {
    const TileRow where = tile_row(p, seq_head, row);
    const BackwardWorkspace& numbers = walk.numbers(w, at);
    const int64_t from = row_offset(numbers.row, seq_head, where);
    sm80::cp_async4(sm80::shared_address(&rows.lse[i]), numbers.lse + from);
    sm80::cp_async4(sm80::shared_address(&rows.delta[i]), numbers.delta + from);
    if (needs_mask) rows.keys[i] = walk.visible_keys(seq_head, where.token, at);
  } else {
    rows.lse[i] = INFINITY, rows.delta[i] = 0.f;
    if (needs_mask) rows.keys[i] = {};
  }
}

}  // namespace flux::cuda
