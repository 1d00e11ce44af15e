// Where the rows of a tile, and the keys it sees, live in memory.
//
// Row r of a tile is query token r / group and head r % group of its KV head's group.
#pragma once

#include "core/params.h"
#include "core/schedule.h"

namespace flux::cuda {

struct TileRow {
  int32_t token;  // within the tile
  int32_t head;   // query head of the whole layer
};

FLUX_HD TileRow tile_row(int32_t group, const TileView& v, int32_t row) {
  const int32_t token = row / group;
  return {token, v.tile.kv_head * group + (row - token * group)};
}
FLUX_HD TileRow tile_row(const AttendParams& p, const TileView& v, int32_t row) { return tile_row(p.group(), v, row); }

// Rows of the tile that hold a query; the others are padding.
FLUX_HD int32_t valid_rows(const AttendParams& p, const TileView& v) { return v.q_rows.size() * p.group(); }

// Offsets in elements.
FLUX_HD int64_t row_offset(const Strides& s, const TileView& v, const TileRow& r) {
  return v.tile.seq * s.b + int64_t(v.q_rows.begin + r.token) * s.s + r.head * s.h;
}

template <typename T>
FLUX_HD const T* q_row(const AttendParams& p, const TileView& v, const TileRow& r) {
  return static_cast<const T*>(p.q.data) + row_offset(p.q.stride, v, r);
}
template <typename T>
FLUX_HD T* out_row(const AttendParams& p, const TileView& v, const TileRow& r) {
  return static_cast<T*>(p.out.data) + row_offset(p.out.stride, v, r);
}
FLUX_HD float& lse_at(const AttendParams& p, const TileView& v, const TileRow& r) {
  return p.lse[row_offset(p.lse_stride, v, r)];
}

// Rows of k or v of one sequence head, by key position; paged or not.
struct KvRows {
  const int32_t* pages = nullptr;  // null: not paged
  int64_t base = 0, row_stride = 0, page_stride = 0;
  int32_t first = 0, count = 0;  // first row of the sequence; its keys
  int32_t page_size = 1, last_page = 0;

  FLUX_HD bool contains(int32_t kv_pos) const { return kv_pos >= 0 && kv_pos < count; }

  // Offset from `base`, in elements, of a key that the sequence contains.
  FLUX_HD int64_t offset(int32_t kv_pos) const {
    const int32_t row = first + kv_pos;
    if (!pages) return row * row_stride;
    const int32_t page = row / page_size;
    // Tables are not read back to check them: an entry outside the cache is clamped into it.
    const int32_t index = min_of(max_of(pages[page], 0), last_page);
    return index * page_stride + (row - page * page_size) * row_stride;
  }
  FLUX_HD int64_t operator()(int32_t kv_pos) const { return base + offset(kv_pos); }
};

FLUX_HD KvRows kv_rows(const KeyValues& kv, const View& x, const TileView& v) {
  const Strides& s = x.stride;
  KvRows r;
  r.first = v.kv_rows.begin;
  r.count = v.kv_rows.size();
  r.row_stride = s.s;
  if (kv.page_table) {
    r.pages = kv.page_table + v.tile.seq * kv.page_stride_b + v.tile.kv_head * kv.page_stride_h;
    r.base = kv.pages_per_head ? 0 : v.tile.kv_head * s.h;
    r.page_stride = s.b;
    r.page_size = kv.page_size;
    r.last_page = kv.num_pages - 1;
  } else {
    r.base = v.tile.seq * s.b + v.tile.kv_head * s.h;
  }
  return r;
}

}  // namespace flux::cuda
