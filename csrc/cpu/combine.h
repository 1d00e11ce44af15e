// Stage 4: the pieces of cut tiles are merged; results are written.
#pragma once

#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace flux::cpu {

// One worker's piece of a cut tile; empty until there is one.
struct Partial {
  std::vector<SoftmaxState> rows;  // [tile_rows]
  std::vector<float> out;          // [tile_rows, padded_dim]
};

// Normalises a finished tile and writes `out` and `lse`.
void write_tile(const AttendParams& p, const TileView& v, const TileState& state);

// partials: two per worker, see partial_slot.
void combine(const AttendParams& p, const TileShape& shape, const Plan& plan, std::vector<Partial>& partials,
             const Executor& executor);

}  // namespace flux::cpu
