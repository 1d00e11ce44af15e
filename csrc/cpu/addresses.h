// Where the rows of a sequence are: the only place of the CPU kernels that knows layouts.
#pragma once

#include "core/params.h"
#include "core/schedule.h"

namespace flux::cpu {

template <typename T>
FLUX_HD const T* q_row(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return static_cast<const T*>(p.q) + t.seq * p.q_stride.b + row * p.q_stride.s + head * p.q_stride.h;
}

// `pos` counts from the first key of the sequence.
template <typename T>
FLUX_HD const T* kv_row(const AttendParams& p, const void* base, const Strides& stride, const TileView& v,
                        int32_t pos) {
  const int64_t row = v.kv_rows.begin + pos;
  const T* data = static_cast<const T*>(base);
  if (!p.page_table) return data + v.tile.seq * stride.b + row * stride.s + v.tile.kv_head * stride.h;
  const int64_t page =
      p.page_table[v.tile.seq * p.page_stride_b + v.tile.kv_head * p.page_stride_h + row / p.page_size];
  // Pages of one head belong to a page table per head.
  return data + page * stride.b + (row % p.page_size) * stride.s + (p.pages_per_head ? 0 : v.tile.kv_head * stride.h);
}

template <typename T>
FLUX_HD T* out_row(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return static_cast<T*>(p.out) + t.seq * p.out_stride.b + row * p.out_stride.s + head * p.out_stride.h;
}

FLUX_HD float& lse_at(const AttendParams& p, const Tile& t, int32_t row, int32_t head) {
  return p.lse[t.seq * p.lse_stride.b + row * p.lse_stride.s + head * p.lse_stride.h];
}

}  // namespace flux::cpu
