// What one launch passes to the kernel.
#pragma once

#include <cuda.h>

#include "cuda/cuda.h"

namespace flux::cuda::sm90 {

struct KernelParams {
  // q: {D, Hq, S, B} in boxes {slab, group, q_tokens}; k, v: {D, S or page_size, Hkv, B or pages} in boxes {slab,
  // kv_rows}.
  CUtensorMap q_map, k_map, v_map;
  AttendParams attend;
  TileShape tile;
  PlanView plan;
  Partials partials;
  int32_t kv_box_rows;  // rows of one K or V box: the key block, or a page that is smaller
};

}  // namespace flux::cuda::sm90
