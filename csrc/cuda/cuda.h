// The four stages on CUDA: plain launchers, the only interface between the torch operators (host compiler) and the
// kernels (nvcc, no torch headers). Nothing here synchronises with the host: lengths and routes stay on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/params.h"
#include "core/schedule.h"
#include "core/softmax_state.h"

namespace flux::cuda {

// What the plan stage leaves in device memory for attend and combine.
//
// Rows are (sequence, KV head) pairs, costliest first; the tiles of a row are neighbours, longest first, so that
// tiles running at the same time read the same keys. Either every item is one whole tile, taken from a counter
// (many tiles: balanced by their number), or there is one item per worker, an even share of all key blocks (few tiles).
struct PlanHeader {
  int32_t num_tiles;
  int32_t num_items;   // whole tiles: num_tiles; else num_workers
  int32_t whole_tiles; // 1: item i is tile i; 0: item i is ranges[i]
  int32_t next_item;   // counter of the persistent workers
};

struct PlanView {
  PlanHeader* header = nullptr;
  int32_t* row_order = nullptr;   // [rows] seq * num_kv_heads + kv_head
  int32_t* tile_begin = nullptr;  // [rows + 1]
  int64_t* cost = nullptr;        // [max_tiles + 1] (split only)
  WorkRange* ranges = nullptr;    // [num_workers] (split only)
};

// Partials of cut tiles: slot s holds `tile_rows` rows; see partial_slot.
struct Partials {
  float* out = nullptr;           // [2 * num_workers, tile_rows, D], not normalised
  SoftmaxState* state = nullptr;  // [2 * num_workers, tile_rows]
};

// One launch configuration, chosen on the host from shapes alone (never from values on the device).
struct AttendConfig {
  TileShape tile;       // q_tokens = tile_rows / group
  int32_t tile_rows = 0;
  int32_t num_workers = 0;
};

AttendConfig attend_config(const AttendParams& p, int device);
size_t workspace_bytes(const AttendParams& p, const AttendConfig& c);

// Stage launchers; `workspace` is 256-byte aligned device memory of workspace_bytes.
cudaError_t route(const RouteParams& p, cudaStream_t stream);
cudaError_t plan(const AttendParams& p, const AttendConfig& c, void* workspace, cudaStream_t stream);
cudaError_t attend(const AttendParams& p, const AttendConfig& c, void* workspace, cudaStream_t stream);
cudaError_t combine(const AttendParams& p, const AttendConfig& c, void* workspace, cudaStream_t stream);

}  // namespace flux::cuda
