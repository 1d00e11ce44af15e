// What one launch passes to the kernel.
#pragma once

#include <cuda.h>

#include "cuda/cuda.h"

namespace flux::cuda::sm90 {

// The query token that a row of a tile belongs to, row / group, by a multiplication.
constexpr uint32_t inverse_of_group(int32_t group) { return (1u << 16) / uint32_t(group) + 1; }
FLUX_HD constexpr int32_t token_of_row(int32_t row, uint32_t group_inverse) {
  return int32_t(uint32_t(row) * group_inverse >> 16);
}
constexpr bool token_of_row_is_exact() {
  for (int32_t group = 1; group <= 192; ++group)
    for (int32_t row = 0; row < 192; ++row)
      if (token_of_row(row, inverse_of_group(group)) != row / group) return false;
  return true;
}
static_assert(token_of_row_is_exact());

// Whether an instance's scheduler does more than walk the plan's items. At head dimension 256 with two consumer
// warpgroups it had no registers for that; it has them now (docs/kernels_diary.md, v14), but that it gains anything was
// not measured.
constexpr bool has_spare_registers(int32_t head_dim, int32_t tile_rows) { return head_dim <= 128 || tile_rows == 64; }

struct KernelParams {
  // q: {D, Hq, S, B} in boxes {slab, group, q_tokens}; k, v: {D, S or page_size, Hkv, B or pages} in boxes {slab,
  // kv_rows}. out: as q.
  CUtensorMap q_map, k_map, v_map, out_map;
  AttendParams attend;
  TileShape tile;
  PlanView plan;
  TileOrder order;  // if it is not the plan's, num_tiles and tiles_each say it
  int32_t num_tiles, tiles_each;
  bool inline_plan;  // of few tiles, see line_up_few
  bool uncounted;    // see is_uncounted
  Partials partials;
  int32_t group;  // query heads that share a KV head
  uint32_t group_inverse;
  int32_t kv_box_rows;  // rows of one K or V box: the key block, or a page that is smaller
};

}  // namespace flux::cuda::sm90
