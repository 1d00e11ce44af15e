// Block selection on one block of queries, for the instruction set this file is compiled for. As in attend_tile.h the
// queries lie across the lanes, and the keys are the left operand.
#pragma once

#include "cpu/attend_tile.h"

namespace flux::cpu::FLUX_ISA {

// Columns [first, first + kStepRows) as left operands, one behind the other; zeros past the end of the keys.
template <typename Op, typename T>
FLUX_HD void pack_columns(const SelectParams& p, const TileView& keys, int32_t first, int64_t row_stride,
                          typename Op::Unit* to) {
  const int32_t dim = p.head_dim, dim_units = dim / Op::kPerUnit;
  for (int32_t j = 0; j < kStepRows; ++j)
    for (int32_t a = 0; a < p.stride; ++a) {
      const int32_t key = (first + j) * p.stride + a;
      typename Op::Unit* unit = to + j * row_stride + a * dim_units;
      if (key < keys.kv_rows.size())
        Op::pack_keys(kv_row<T>(p.kv, p.kv.k, keys, key), dim, unit);
      else
        clear_rows(unit, 0, dim_units, 0, 1);
    }
}

// Masses of the key blocks that the query block sees.
template <typename Op, typename T>
void select_tile(const SelectParams& p, const Tile& t, float* scratch, float* mass) {
  using Unit = typename Op::Unit;
  const StridedView view(p, t.seq, t.kv_head);
  TileView keys{};
  keys.tile = t;
  keys.kv_rows = view.kv_rows;
  const int32_t group = p.group(), dim_units = p.head_dim / Op::kPerUnit, units = p.stride * dim_units;
  const int32_t first_row = t.q_block * p.rows_per_block();
  const int32_t rows = flux::min_of(view.rows() - first_row, p.rows_per_block()) * group;
  const int32_t columns = view.columns_of(first_row + rows / group - 1), blocks = view.blocks_seen(t.q_block);
  const int64_t key_stride = units + kLanes;  // not a power of two: neighbouring rows share no cache set
  Scratch memory{scratch};
  Unit* const q = memory.take<Unit>(int64_t(units) * kPanel);  // [stride][dim_units][kPanel]
  Unit* const staging = memory.take<Unit>(int64_t(kPanel) * (dim_units + kLanes));
  Unit* const k = memory.take<Unit>(kStepRows * key_stride);
  float* const scores = memory.take(int64_t(round_up(columns, kPad)) * kPanel);
  int32_t* const seen = memory.take<int32_t>(kPanel);
  const float scale = p.log2_scale();
  for (int32_t j = 0; j < blocks; ++j) mass[j] = 0.f;

  for (int32_t panel = 0; panel < rows; panel += kPanel) {
    for (int32_t i = 0; i < kPanel; ++i)
      seen[i] = panel + i < rows ? view.columns_of(first_row + (panel + i) / group) : 0;
    for (int32_t a = 0; a < p.stride; ++a) {
      for (int32_t i = 0; i < kPanel; ++i) {
        const int32_t row = panel + i, query = (first_row + row / group) * p.stride + p.stride - 1 - a;
        Unit* to = staging + int64_t(i) * (dim_units + kLanes);
        if (row < rows && query < view.q_rows.size())
          Op::pack_keys(
              row_of<T>(View{p.q.data, p.q.stride}, t.seq, view.q_rows.begin + query, t.kv_head * group + row % group),
              p.head_dim, to);
        else
          clear_rows(to, 0, dim_units, 0, 1);
      }
      transpose_panel(staging, dim_units + kLanes, dim_units, q + int64_t(a) * dim_units * kPanel);
    }
    for (int32_t j = 0; j < columns; j += kStepRows) {
      pack_columns<Op, T>(p, keys, j, key_stride, k);
      Accumulators c;
      clear(c);
      multiply<Op>(k, key_stride, 1, q, kPanel, units, c);
      store_step(c, scale, scores + int64_t(j) * kPanel);
    }
    for (int half = 0; half < kPanel; half += kLanes) {
      const auto end = load_as<IntVec>(seen + half);
      float* const column = scores + half;
      Vec max = broadcast(-INFINITY), sum = Vec{};
      for (int32_t j = 0; j < columns; ++j) {
        const Vec s = broadcast(j) < end ? load(column + int64_t(j) * kPanel) : broadcast(-INFINITY);
        store(column + int64_t(j) * kPanel, s);
        max = max_of(s, max);
      }
      const Vec base = max == -INFINITY ? Vec{} : max;
      for (int32_t j = 0; j < columns; ++j) {
        const Vec e = exp2_of(load(column + int64_t(j) * kPanel) - base);
        store(column + int64_t(j) * kPanel, e);
        sum += e;
      }
      const Vec factor = end > 0 ? 1.f / sum : Vec{};
      for (int32_t j = 0; j < columns; ++j)
        mass[j / p.columns_per_block()] += sum_of_lanes(load(column + int64_t(j) * kPanel) * factor);
    }
  }
}

}  // namespace flux::cpu::FLUX_ISA
