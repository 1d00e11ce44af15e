// Which kernel a call of attention takes: what the operator `explain` answers, in this order (csrc/torch/library.cpp).
#pragma once

#include <cstdint>

namespace flux {

struct Explanation {
  int64_t family = 0;        // of kernels: 0 the CPU's, 80 csrc/cuda/sm80, 90 csrc/cuda/sm90
  int64_t processor = 0;     // CPU: index into cpu::kIsaNames; CUDA: the device's compute capability, 80, 90, ...
  int64_t decode = 0;        // 1: the kernel for few rows per tile; 0: the one for many
  int64_t tile_rows = 0;     // rows of a tile that there is room for: queries times query heads of a KV head
  int64_t q_tokens = 0;      // queries of a tile
  int64_t kv_block = 0;      // keys of one step
  int64_t head_dim = 0;      // that is computed with: the call's, rounded up
  int64_t workers = 0;       // threads, or thread blocks, that share the work; 0: nothing to do, all others are 0 too
  int64_t plans_itself = 0;  // 1: every thread block plans for itself, without a launch for it
  int64_t workspace_bytes = 0;  // memory that is allocated for the call, besides the outputs, at most
  int64_t copies = 0;           // CUDA: the sum of 1 (q), 2 (k) and 4 (v) for those copied first, see `aligned`
};

}  // namespace flux
