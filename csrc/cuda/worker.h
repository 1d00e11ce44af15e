// Device side of the schedule: from an item of the plan to pieces of tiles.
//
//   for (int32_t item = blockIdx.x; item < plan.header->num_items; item = <take_item by one thread, broadcast>) {
//     const WorkRange range = item_range(plan, item);
//     for (int32_t t = range.tile; t < tiles_end(range); ++t) {
//       const Piece piece = piece_of(view_tile(p, tile, plan.tiles[t]), range, item, t);
//       ... key blocks piece.view.blocks[i] for i in [piece.span.begin, piece.span.end) ...
//     }
//   }
#pragma once

#include "cuda/cuda.h"

namespace flux::cuda {

struct Piece {
  TileView view;
  TileSpan span;
  int32_t slot;  // of the partial where span.split; else the piece is the whole tile

  __device__ bool final() const { return !span.split; }
};

// What a worker's range has of tile t.
__device__ inline Piece piece_of(const TileView& view, const WorkRange& range, int32_t item, int32_t t) {
  return {view, tile_span(range, t, view.blocks.size()), partial_slot(range, item, t)};
}

// The item after those that blocks start with. By one thread of a block.
__device__ inline int32_t take_item(const PlanView& plan) {
  return int32_t(gridDim.x) + atomicAdd(&plan.header->next_item, 1);
}

__device__ inline WorkRange item_range(const PlanView& plan, int32_t item) {
  return plan.header->whole_tiles ? WorkRange{item, 0, item + 1, 0} : plan.ranges[item];
}
// A block's first item. Header and range are loaded at the same time, one latency instead of two; where the header then
// says that tiles are whole, the range is ignored.
__device__ inline WorkRange first_range(const PlanView& plan, const PlanHeader& header) {
  const WorkRange range = plan.ranges[blockIdx.x];
  return header.whole_tiles ? WorkRange{int32_t(blockIdx.x), 0, int32_t(blockIdx.x) + 1, 0} : range;
}

struct BlockPlan {
  PlanHeader header;
  WorkRange range;  // of the item at hand
};
struct WorkerState {
  BlockPlan plan;
  Piece piece;
  int32_t item;
};

// Calls body(piece) for all the work of a block, which begins with shared.plan; every thread takes part. The piece
// stands in shared memory, where it costs no registers. The body may use all other shared memory: barriers stand
// between pieces.
template <typename Body>
__device__ void for_each_piece(const PlanView& plan, const AttendParams& p, const TileShape& tile_shape,
                               WorkerState& shared, Body body) {
  const WorkRange& range = shared.plan.range;
  int32_t item = blockIdx.x;
  while (item < shared.plan.header.num_items) {
    for (int32_t t = range.tile, end = tiles_end(range); t < end; ++t) {
      if (threadIdx.x == 0) shared.piece = piece_of(view_tile(p, tile_shape, plan.tiles[t]), range, item, t);
      __syncthreads();
      body(shared.piece);
      __syncthreads();
    }
    if (!shared.plan.header.whole_tiles) break;  // a share per block
    if (threadIdx.x == 0) {
      shared.item = take_item(plan);
      shared.plan.range = WorkRange{shared.item, 0, shared.item + 1, 0};
    }
    __syncthreads();
    item = shared.item;
  }
}

}  // namespace flux::cuda
