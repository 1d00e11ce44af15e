// A mixture of two patterns on one tile, for the instruction set this file is compiled for: the attend stage of many
// rows, with a softmax for each set of keys (core/mixture.h).
#pragma once

#include "core/mixture.h"
#include "cpu/attend_tile.h"

namespace flux::cpu::FLUX_ISA {

// What a panel of rows sees of some keys, by one branch; `visits`: the branch visits their block.
FLUX_HD Coverage panel_coverage(const TileView& v, bool visits, const PanelRows& rows, const KeyRange& keys) {
  if (!visits || sees_nothing(v, rows, keys)) return Coverage::kNone;
  return needs_mask(v, rows, keys) ? Coverage::kSome : Coverage::kAll;
}

// Lanes: is what they stand for in the set, if `full` and `sparse` see it?
FLUX_HD IntVec in_set(KeySet set, IntVec full, IntVec sparse) {
  return set == kSeenByBoth ? full & sparse : set == kSeenByFullOnly ? full & ~sparse : sparse & ~full;
}

// A panel's rows by both branches, and which of them visit a block of keys.
struct PanelBranches {
  const Branches& v;
  PanelRows full_rows, sparse_rows;
  bool in_full, in_sparse;

  FLUX_HD IntVec full_sees(int half, int32_t key) const { return sees(v.full, in_full, full_rows, half, key); }
  FLUX_HD IntVec sparse_sees(int half, int32_t key) const { return sees(v.sparse, in_sparse, sparse_rows, half, key); }

 private:
  static FLUX_HD IntVec sees(const TileView& view, bool visits, const PanelRows& rows, int half, int32_t key) {
    if (!visits) return IntVec{};
    const auto pos = load_as<IntVec>(rows.pos + half), first = load_as<IntVec>(rows.first_key + half);
    return rows_that_see(view.pattern, pos, first, key);
  }
};

// The scores of a set of keys, -inf elsewhere. False where no row sees a key of the set.
FLUX_HD bool take_set(KeySet set, const PanelBranches& panel, const KeyRange& keys, int32_t padded, const float* scores,
                      float* to) {
  const Vec hidden = broadcast(-INFINITY);
  IntVec any{};
  for (int half = 0; half < kPanel; half += kLanes)
    for (int32_t j = 0; j < padded; ++j) {
      const IntVec in = in_set(set, panel.full_sees(half, keys.begin + j), panel.sparse_sees(half, keys.begin + j));
      any |= in;
      store(to + j * kPanel + half, in ? load(scores + j * kPanel + half) : hidden);
    }
  int32_t lanes[kLanes], found = 0;
  store(lanes, any);
  for (int i = 0; i < kLanes; ++i) found |= lanes[i];
  return found != 0;
}

template <typename Op, typename T>
void mix_tile(const AttendParams& p, const Branches& v, float* scratch, const TileState* sets) {
  using Unit = typename Op::Unit;
  const int32_t group = p.group(), dim = p.head_dim, dim_units = row_units<Op>(p);
  const int32_t rows = v.full.q_rows.size() * group, padded_rows = round_up(rows, kPanel);
  const int32_t out_stride = padded_dim(p);
  const int64_t stride = out_stride + kLanes;  // not a power of two: neighbouring rows share no cache set
  Scratch memory{scratch};
  Unit* const q = memory.take<Unit>(int64_t(padded_rows) * dim_units);
  Unit* const k = memory.take<Unit>(kKvBlock * stride);
  Unit* const values = memory.take<Unit>(kKvBlock * stride);
  Unit* const staging = memory.take<Unit>(kPanel * stride);
  float* const scores = memory.take(kKvBlock * kPanel);
  float* const masked = memory.take(kKvBlock * kPanel);
  Unit* const probabilities = memory.take<Unit>(kKvBlock * kPanel);
  float* const max = memory.take(kKeySets * padded_rows);
  float* const sum = memory.take(kKeySets * padded_rows);
  int32_t* const pos = memory.take<int32_t>(padded_rows);
  int32_t* const full_first = memory.take<int32_t>(padded_rows);
  int32_t* const sparse_first = memory.take<int32_t>(padded_rows);

  [[maybe_unused]] const typename Op::Registers registers;
  clear_rows(k, stride, int32_t(stride), 0, kKvBlock);  // columns beyond head_dim stay 0, here and below
  clear_rows(values, stride, int32_t(stride), 0, kKvBlock);
  pack_queries<Op, T>(p, v.full, rows, stride, staging, q);
  find_visible(v.full, group, rows, padded_rows, pos, full_first);
  find_visible(v.sparse, group, rows, padded_rows, pos, sparse_first);
  for (int32_t r = 0; r < kKeySets * padded_rows; ++r) max[r] = -INFINITY, sum[r] = 0.f;
  for (int set = 0; set < kKeySets; ++set)
    std::memset(sets[set].out, 0, size_t(padded_rows) * out_stride * sizeof(float));

  for (BothBlocks blocks(v); blocks.more(); blocks.next()) {
    const KeyRange keys = keys_of(v.full, blocks.block);
    const int32_t padded = round_up(keys.size, Op::kKeyStep);
    pack_block<Op, T>(p, v.full, keys, stride, k, values);
    for (int32_t row = 0; row < padded_rows; row += kPanel) {
      const PanelBranches panel{v, panel_rows(v.full, group, row, rows, pos, full_first),
                                panel_rows(v.sparse, group, row, rows, pos, sparse_first), blocks.in_full,
                                blocks.in_sparse};
      const Coverage full = panel_coverage(v.full, panel.in_full, panel.full_rows, keys);
      const Coverage sparse = panel_coverage(v.sparse, panel.in_sparse, panel.sparse_rows, keys);
      if (full == Coverage::kNone && sparse == Coverage::kNone) continue;
      Op::score(k, stride, q + int64_t(row) * dim_units, dim_units, padded, p.scale * kLog2e, scores);
      for (int n = 0; n < kKeySets; ++n) {
        const auto set = KeySet(n);
        const Coverage seen = coverage(set, full, sparse);
        if (seen == Coverage::kNone) continue;
        if (seen == Coverage::kSome && !take_set(set, panel, keys, padded, scores, masked)) continue;
        attend_panel<Op>(seen == Coverage::kAll ? scores : masked, padded, values, stride, rows - row, dim,
                         probabilities, max + set * padded_rows + row, sum + set * padded_rows + row,
                         sets[set].out + int64_t(row) * out_stride, out_stride);
      }
    }
  }
  for (int set = 0; set < kKeySets; ++set)
    for (int32_t r = 0; r < rows; ++r) sets[set].rows[r] = {max[set * padded_rows + r], sum[set * padded_rows + r]};
}

}  // namespace flux::cpu::FLUX_ISA
