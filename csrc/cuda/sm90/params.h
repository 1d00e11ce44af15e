// What one launch passes to the kernel.
#pragma once

#include <cuda.h>

#include "cuda/cuda.h"

namespace flux::cuda::sm90 {

// row / group for the rows of a tile, by a multiplication.
constexpr uint32_t inverse_of(int32_t group) { return (1u << 16) / uint32_t(group) + 1; }
FLUX_HD int32_t quotient(int32_t row, uint32_t inverse) { return int32_t(uint32_t(row) * inverse >> 16); }

struct KernelParams {
  // q: {D, Hq, S, B} in boxes {slab, group, q_tokens}; k, v: {D, S or page_size, Hkv, B or pages} in boxes {slab,
  // kv_rows}.
  CUtensorMap q_map, k_map, v_map;
  AttendParams attend;
  TileShape tile;
  PlanView plan;
  Partials partials;
  uint32_t group_inverse;
  int32_t kv_box_rows;  // rows of one K or V box: the key block, or a page that is smaller
};

}  // namespace flux::cuda::sm90
