// Which key blocks a block of queries keeps, by antidiagonal scores (XAttention, arXiv 2503.16428).
//
// `stride` neighbouring queries taken in reverse, one behind the other, are a row; `stride` neighbouring keys are a
// column. Row times column is the sum of an antidiagonal of the scores, in which every query and every key of the
// stride x stride pairs occurs once. The softmax of a row over its visible columns, summed over the rows of a block of
// queries and over the columns of a key block, is the block's mass. Rows and columns count from the first query and
// the first key of a sequence; past its end stand zeros.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/params.h"
#include "core/softmax_state.h"

namespace flux {

struct SelectParams {
  int32_t batch = 0, head_dim = 0;
  DType dtype = DType::kFloat32;  // of q and k
  float scale = 1.f;              // of the scores of attention; a sum of `stride` of them is divided by that
  double threshold = 1.;          // share of the mass to keep, in (0, 1]
  int32_t stride = 16, width = 128;
  Queries q;
  KeyValues kv;               // v is not looked at
  Routing routing;            // the route alone is looked at
  int32_t mode = 1;           // where the route is another one, no block is kept; no route: selected everywhere
  int32_t* blocks = nullptr;  // [B, Hkv, q_blocks, max_count]
  int32_t* counts = nullptr;  // [B, Hkv, q_blocks]
  int32_t q_blocks = 0, max_count = 0;

  FLUX_HD int32_t group() const { return q.num_heads / kv.num_heads; }
  FLUX_HD int32_t columns_per_block() const { return width / stride; }
  FLUX_HD int32_t rows_per_block() const { return kQueryBlock / stride; }
  // Of a softmax in base 2.
  FLUX_HD float log2_scale() const { return scale / float(stride) * kLog2e; }
  FLUX_HD int64_t list(int32_t seq, int32_t kv_head, int32_t q_block) const {
    return (int64_t(seq) * kv.num_heads + kv_head) * q_blocks + q_block;
  }
};

// One sequence head: its rows and columns, and which of them meet.
struct StridedView {
  Span q_rows, kv_rows;
  int32_t stride, width;

  FLUX_HD StridedView(const SelectParams& p, int32_t seq, int32_t kv_head)
      : q_rows(p.q.rows(seq, kv_head)), kv_rows(p.kv.rows(seq, kv_head)), stride(p.stride), width(p.width) {
    if (p.routing.route && p.routing.mode(seq, kv_head) != p.mode) q_rows.end = q_rows.begin;
  }

  FLUX_HD int32_t offset() const { return kv_rows.size() - q_rows.size(); }  // position of the first query
  FLUX_HD int32_t rows() const { return ceil_div(q_rows.size(), stride); }
  // Columns that a row sees: those with a key at or before the row's last query. 0 in padding.
  FLUX_HD int32_t columns_of(int32_t row) const {
    if (row >= rows()) return 0;
    const int32_t end = min_of(offset() + (row + 1) * stride, kv_rows.size());
    return end <= 0 ? 0 : ceil_div(end, stride);
  }
  FLUX_HD int32_t q_blocks() const { return ceil_div(q_rows.size(), kQueryBlock); }
  // Key blocks up to the last query's; of a block behind the last one, up to the end.
  FLUX_HD int32_t blocks_seen(int32_t q_block) const {
    const int32_t end = min_of((q_block + 1) * kQueryBlock, q_rows.size()) + offset();
    return end <= 0 ? 0 : ceil_div(end, width);
  }
  // Always kept: the first block, and those that hold a key at or after the first query's.
  FLUX_HD bool always(int32_t q_block, int32_t block) const {
    return block == 0 || (block + 1) * width > q_block * kQueryBlock + offset();
  }
};

// Shares are compared and added as integers, so that no order of additions matters and ties are ties on every device.
// Of equal shares the earlier block is kept first.
constexpr float kShareUnits = float(1 << 30);
FLUX_HD int32_t share_units(float mass, float total) { return int32_t(rintf(mass / total * kShareUnits)); }

// Masses that are not finite say nothing, and a share of 1 is all of them: every block seen is kept.
FLUX_HD bool keeps_all(float total, double threshold) { return !(total > 0.f && total < INFINITY) || threshold >= 1.; }

// How many units the kept blocks must have together.
FLUX_HD int64_t units_needed(int64_t total_units, double threshold) {
  return int64_t(ceil(threshold * double(total_units)));
}

}  // namespace flux
