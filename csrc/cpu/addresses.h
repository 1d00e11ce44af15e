// Where the rows of a sequence are: the only place of the CPU kernels that knows layouts.
#pragma once

#include "core/params.h"
#include "core/schedule.h"

namespace flux::cpu {

// Row `row` of a tensor that is not paged.
template <typename T>
FLUX_HD const T* row_of(const View& x, int32_t seq, int32_t row, int32_t head) {
  return static_cast<const T*>(x.data) + seq * x.stride.b + row * x.stride.s + head * x.stride.h;
}
template <typename T>
FLUX_HD T* row_of(const MutableView& x, int32_t seq, int32_t row, int32_t head) {
  return static_cast<T*>(x.data) + seq * x.stride.b + row * x.stride.s + head * x.stride.h;
}

template <typename T>
FLUX_HD const T* q_row(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return row_of<T>(View{p.q.data, p.q.stride}, t.seq, row, head);
}
template <typename T>
FLUX_HD T* out_row(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return row_of<T>(p.out, t.seq, row, head);
}
FLUX_HD int64_t lse_offset(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return t.seq * p.lse_stride.b + row * p.lse_stride.s + head * p.lse_stride.h;
}
FLUX_HD float& lse_at(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return p.lse[lse_offset(p, t, row, head)];
}

// Key or value `pos`, counted from the first of the sequence; paged or not.
template <typename T>
FLUX_HD const T* kv_row(const KeyValues& kv, const View& x, const TileView& v, int32_t pos) {
  const int64_t row = v.kv_rows.begin + pos;
  const int32_t seq = v.tile.seq, head = v.tile.kv_head;
  const T* data = static_cast<const T*>(x.data);
  if (!kv.page_table) return data + seq * x.stride.b + row * x.stride.s + head * x.stride.h;
  const int64_t page = kv.page_table[seq * kv.page_stride_b + head * kv.page_stride_h + row / kv.page_size];
  return data + page * x.stride.b + (row % kv.page_size) * x.stride.s + (kv.pages_per_head ? 0 : head * x.stride.h);
}

}  // namespace flux::cpu
