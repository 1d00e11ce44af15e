// The pattern of one query row, ready for many keys: what `visible` says, with the divisions done once.
#pragma once

#include "core/schedule.h"

namespace flux::cuda {

struct RowMask {
  int32_t begin = 0;  // sees keys [begin, last], and of those before begin the first `sink`
  int32_t last = -1;
  int32_t sink = 0;

  FLUX_HD bool sees(int32_t kv_pos) const { return kv_pos <= last && (kv_pos >= begin || kv_pos < sink); }
};

// `token` counts from the first query of the tile. Block lists are applied by visiting only listed blocks.
FLUX_HD RowMask row_mask(const TileView& v, int32_t token) {
  RowMask m;
  if (token >= v.q_rows.size()) return m;  // padding rows see nothing
  m.last = v.q_pos + token;
  if (v.list.blocks || m.last < 0 || m.last >= v.kv_rows.size() - v.pattern.last_q) return m;
  m.begin = v.pattern.window_begin(m.last);
  m.sink = v.pattern.sink;
  return m;
}

}  // namespace flux::cuda
