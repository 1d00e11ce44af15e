// What `visible` and `needs_mask` say, with the divisions done once per tile instead of once per key block.
#pragma once

#include "core/schedule.h"

namespace flux::cuda {

struct RowMask {
  int32_t begin = 0;  // sees keys [begin, last], and of those before begin the first `sink`
  int32_t last = -1;
  int32_t sink = 0;

  FLUX_HD bool sees(int32_t kv_pos) const { return kv_pos <= last && (kv_pos >= begin || kv_pos < sink); }
};

// The last key that a query of the tile may see; padding rows see nothing.
FLUX_HD int32_t last_seen(const TileView& v, int32_t token) { return token < v.q_rows.size() ? v.q_pos + token : -1; }

// Do its queries see every key before their own that the tile visits?
FLUX_HD bool sees_all_before(const TileView& v) { return v.list.blocks || v.pattern.window >= kUnlimited; }

// `token` counts from the first query of the tile. Block lists are applied by visiting only listed blocks.
FLUX_HD RowMask row_mask(const TileView& v, int32_t token) {
  RowMask m;
  m.last = last_seen(v, token);
  if (v.list.blocks || m.last < 0 || m.last >= v.kv_rows.size() - v.pattern.last_q) return m;
  m.begin = v.pattern.window_begin(m.last);
  m.sink = v.pattern.sink;
  return m;
}

// Whether a block of keys must be masked: `TileView::masked`.
struct TileMask {
  int32_t first;  // position of the first query
  int32_t begin;  // the last window of the tile starts here
  int32_t sink;

  FLUX_HD explicit TileMask(const TileView& v) : first(v.q_pos), begin(-kUnlimited), sink(v.pattern.sink) {
    const int32_t last = min_of(v.q_pos_end(), v.kv_rows.size() - v.pattern.last_q) - 1;
    if (!v.list.blocks && last >= v.q_pos) begin = v.pattern.window_begin(last);
  }

  FLUX_HD bool operator()(int32_t kv_begin, int32_t kv_end) const {
    return kv_end - 1 > first || (kv_end > sink && max_of(kv_begin, sink) < begin);
  }
};

}  // namespace flux::cuda
