// What is compiled once per instruction set: the work on one tile. Everything else is ordinary code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/mixture.h"
#include "core/params.h"
#include "core/schedule.h"
#include "core/selection.h"
#include "core/softmax_state.h"

namespace flux::cpu {

constexpr int32_t kKvBlock = 64;
constexpr int32_t kFewRows = 8;        // a tile of at most so many goes a way of its own, see attend_tile.h
constexpr int32_t kMaxTileRows = 128;  // more only where one query token has more heads than this
constexpr int32_t kPad = 32;           // rows and columns are padded to this: the widest panel of any instruction set

constexpr int32_t round_up(int32_t n, int32_t to) { return ceil_div(n, to) * to; }

// Query tokens per tile: a power of two, so that a tile never straddles two query blocks of a block list (128).
inline TileShape tile_shape(const AttendParams& p) {
  int32_t tokens = kMaxTileRows;
  while (tokens > 1 && tokens * p.group() > kMaxTileRows) tokens /= 2;
  return {tokens, kKvBlock};
}
inline int32_t tile_rows(const AttendParams& p) { return round_up(tile_shape(p).q_tokens * p.group(), kPad); }
inline int32_t padded_dim(const AttendParams& p) { return round_up(p.head_dim, kPad); }

// The running result of a tile (row = query * group + head of the group).
struct TileState {
  SoftmaxState* rows = nullptr;  // [tile_rows]
  float* out = nullptr;          // [tile_rows, padded_dim], not normalised
};

// Scratch memory of one worker, in floats.
inline size_t attend_scratch(const AttendParams& p) {
  const size_t rows = tile_rows(p), dim = padded_dim(p), block = kKvBlock;
  return rows * dim                  // q, transposed
         + 2 * block * (dim + kPad)  // k, v
         + kPad * (dim + kPad)       // rows on their way to q
         + 2 * block * kPad          // scores, probabilities
         + 4 * rows;                 // softmax state, positions
}

inline size_t mix_scratch(const AttendParams& p) {
  const size_t rows = tile_rows(p), block = kKvBlock;
  return attend_scratch(p) + block * kPad  // scores of a set of keys
         + (2 * kKeySets - 1) * rows;      // softmax states, positions
}

// SetGradient of the rows of a tile, by its members: [tile_rows] each.
struct RowGradients {
  float *lse, *share, *delta;

  FLUX_HD SetGradient operator[](int32_t row) const { return {lse[row], share[row], delta[row]}; }
  FLUX_HD void set(int32_t row, const SetGradient& g) const {
    lse[row] = g.lse;
    share[row] = g.share;
    delta[row] = g.delta;
  }
};

// What the second pass of the gradients has to know of the rows of a tile. Of hard routes kSeenByFullOnly alone is
// there.
struct TileGradients {
  RowGradients sets[kKeySets];
};

inline size_t backward_scratch(const AttendParams& p) {
  const size_t rows = tile_rows(p), stride = padded_dim(p) + kPad, block = kKvBlock;
  return 4 * rows * stride + 5 * block * stride + 2 * kPad * stride + 2 * rows * kPad + block * kPad + 3 * rows;
}

inline size_t select_scratch(const SelectParams& p) {
  const size_t units = size_t(p.stride) * p.head_dim, columns = ceil_div(p.kv.rows.capacity, p.stride);
  return units * kPad                  // q, transposed
         + kPad * (p.head_dim + kPad)  // rows on their way to q
         + kPad * (units + kPad)       // columns of a step
         + (columns + kPad) * kPad     // scores
         + kPad;                       // columns that a row sees
}

struct Kernels {
  const char* isa;
  // Key blocks [begin, end) of a tile: writes all of `state`. One function per DType.
  void (*attend[3])(const AttendParams& p, const TileView& v, int32_t begin, int32_t end, float* scratch,
                    const TileState& state);
  // Writes all of `sets`.
  void (*mix[3])(const AttendParams& p, const Branches& v, float* scratch, const TileState* sets);
  // Mixture null: hard routes. Returns the gradient of the weight by the rows of the tile, 0 without a mixture.
  double (*queries_backward[3])(const AttendBackwardParams& b, const Mixture* m, const Branches& v, float* scratch,
                                const TileGradients& gradients);
  void (*keys_backward[3])(const AttendBackwardParams& b, const Branches* tiles, const TileGradients* gradients,
                           int32_t num_tiles, int32_t block, float* scratch);
  // Writes the masses of the blocks that a block of queries sees; t.q_block is of kQueryBlock queries.
  void (*select[3])(const SelectParams& p, const Tile& t, float* scratch, float* mass);
};

// The best of what was built and what the processor has.
const Kernels& kernels();

}  // namespace flux::cpu
