// The gradients, for the instruction set this file is compiled for.
//
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta) scale, delta = dO . O per row    (arXiv 2205.14135, section B)
//   dQ = dS K, dK = dS^T Q, dV = P^T dO
//
// Two passes, each with one writer per result and a fixed order of additions, so the bits depend on nothing else: a
// tile of queries against its key blocks gives dQ (and leaves lse and delta for the second pass), a block of keys
// against the tiles that see it gives dK and dV. In both the side that stays lies across the lanes.
#pragma once

#include "cpu/attend_tile.h"

namespace flux::cpu::FLUX_ISA {

// c[kStepRows, kPanel] = A B, A row-major. Both come straight from the inputs, so pairs of bf16 lose nothing here; the
// products with P and dS stay fp32.
template <typename Op, typename Unit>
FLUX_HD void multiply_rows(const Unit* a, int64_t stride, const Unit* panel, int32_t units, Accumulators& c) {
  clear(c);
  multiply<Op>(a, stride, 1, panel, kPanel, units, c);
}

// out[kPanel, dim] += left^T right, left [n, kPanel]
FLUX_HD void add_transposed(const float* left, const float* right, int64_t stride, int32_t n, int32_t rows, int32_t dim,
                            float* out, int64_t out_stride) {
  for (int32_t d = 0; d < dim; d += kPanel)
    for (int32_t r = 0; r < rows; r += kStepRows) {
      float* to = out + r * out_stride + d;
      Accumulators c;
#pragma GCC unroll 8
      for (int i = 0; i < kStepRows; ++i)
        c.c[i][0] = load(to + i * out_stride), c.c[i][1] = load(to + i * out_stride + kLanes);
      multiply<Float32Units>(left + r, 1, kPanel, right + d, stride, n, c);
#pragma GCC unroll 8
      for (int i = 0; i < kStepRows; ++i)
        store(to + i * out_stride, c.c[i][0]), store(to + i * out_stride + kLanes, c.c[i][1]);
    }
}

template <typename T>
FLUX_HD void write_row(const float* from, int32_t dim, T* to) {
  for (int32_t d = 0; d < dim; ++d) from_float(from[d], to[d]);
}

// First pass. Writes grad_q of the tile, and stats.
template <typename Op, typename T>
void queries_backward(const AttendBackwardParams& b, const TileView& v, float* scratch, const RowStats& stats) {
  using Unit = typename Op::Unit;
  const AttendParams& p = b.forward;
  const int32_t group = p.group(), dim = p.head_dim;
  const int32_t dim_units = dim / Op::kPerUnit;
  const int32_t rows = v.q_rows.size() * group, panels = ceil_div(rows, kPanel), padded_rows = panels * kPanel;
  const int64_t stride = padded_dim(p) + kLanes;
  Scratch memory{scratch};
  Unit* const q = memory.take<Unit>(int64_t(padded_rows) * dim_units);     // [panels][dim_units][kPanel]
  Unit* const dout = memory.take<Unit>(int64_t(padded_rows) * dim_units);  // the same
  float* const dq = memory.take(padded_rows * stride);
  float* const k = memory.take(kKvBlock * stride);
  Unit* const k_units = memory.take<Unit>(kKvBlock * stride);
  Unit* const values = memory.take<Unit>(kKvBlock * stride);
  Unit* const staging = memory.take<Unit>(2 * kPanel * stride);
  float* const dscores = memory.take(kKvBlock * kPanel);
  int32_t* const pos = memory.take<int32_t>(padded_rows);
  int32_t* const first_key = memory.take<int32_t>(padded_rows);

  for (int32_t panel = 0; panel < panels; ++panel) {
    Unit* const q_rows = staging;
    Unit* const dout_rows = staging + kPanel * stride;
    clear_rows(staging, stride, int32_t(stride), 0, 2 * kPanel);
    for (int32_t i = 0; i < kPanel; ++i) {
      const int32_t r = panel * kPanel + i;
      stats.lse[r] = INFINITY;  // probability 0: padding, and rows that see no key
      stats.delta[r] = 0.f;
      if (r >= rows) continue;
      const int32_t row = v.q_rows.begin + r / group, head = v.tile.kv_head * group + r % group;
      const T* grad = row_of<const T>(b.grad_out, v.tile.seq, row, head);
      const T* out = out_row<const T>(p, v.tile, row, head);
      Op::pack_keys(q_row<T>(p, v.tile, row, head), dim, q_rows + i * stride);
      Op::pack_keys(grad, dim, dout_rows + i * stride);
      for (int32_t d = 0; d < dim; ++d) stats.delta[r] += to_float(out[d]) * to_float(grad[d]);
      const float lse = lse_at(p, v.tile, row, head);
      if (lse != -INFINITY) stats.lse[r] = lse * kLog2e;
    }
    transpose_panel(q_rows, stride, dim_units, q + int64_t(panel) * dim_units * kPanel);
    transpose_panel(dout_rows, stride, dim_units, dout + int64_t(panel) * dim_units * kPanel);
  }
  find_visible(v, group, rows, padded_rows, pos, first_key);
  clear_rows(dq, stride, int32_t(stride), 0, padded_rows);
  clear_rows(k, stride, int32_t(stride), 0, kKvBlock);  // columns beyond head_dim stay 0
  const float scale = p.scale, scale2 = p.scale * kLog2e;

  for (int32_t n = 0; n < v.blocks.size(); ++n) {
    const KeyRange keys = keys_of(v, v.blocks[n]);
    const int32_t padded = round_up(keys.size, kStepRows);
    for (int32_t j = 0; j < keys.size; ++j) {
      const T* key = kv_row<T>(p.kv, p.kv.k, v, keys.begin + j);
      pack_row(key, dim, k + j * stride);
      Op::pack_keys(key, dim, k_units + j * stride);
      Op::pack_keys(kv_row<T>(p.kv, p.kv.v, v, keys.begin + j), dim, values + j * stride);
    }
    clear_rows(k_units, stride, dim_units, keys.size, padded);
    clear_rows(values, stride, dim_units, keys.size, padded);
    for (int32_t panel = 0; panel < panels; ++panel) {
      const int32_t row = panel * kPanel;
      const PanelRows seen = panel_rows(v, group, row, rows, pos, first_key);
      if (sees_nothing(v, seen, keys)) continue;
      for (int32_t j = 0; j < padded; j += kStepRows) {
        Accumulators s;
        multiply_rows<Op>(k_units + j * stride, stride, q + int64_t(row) * dim_units, dim_units, s);
        store_step(s, scale2, dscores + j * kPanel);
      }
      if (needs_mask(v, seen, keys)) mask_panel(v.pattern, seen, keys, padded, dscores);
      for (int32_t j = 0; j < padded; j += kStepRows) {
        Accumulators dp;
        multiply_rows<Op>(values + j * stride, stride, dout + int64_t(row) * dim_units, dim_units, dp);
        for (int half = 0; half < 2; ++half) {
          const Vec lse = load(stats.lse + row + half * kLanes), delta = load(stats.delta + row + half * kLanes);
          for (int i = 0; i < kStepRows; ++i) {
            float* s = dscores + (j + i) * kPanel + half * kLanes;
            store(s, exp2_of(load(s) - lse) * (dp.c[i][half] - delta) * scale);
          }
        }
      }
      add_transposed(dscores, k, stride, keys.size, flux::min_of(rows - row, kPanel), dim, dq + row * stride, stride);
    }
  }
  for (int32_t r = 0; r < rows; ++r)
    write_row(dq + r * stride, dim,
              row_of<T>(b.grad_q, v.tile.seq, v.q_rows.begin + r / group, v.tile.kv_head * group + r % group));
}

// -inf where a row of a tile does not see a key of a panel. scores: [rows, kPanel]
FLUX_HD void mask_keys(const TileView& v, int32_t group, int32_t rows, int32_t key_begin, float* scores) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Vec hidden = broadcast(-INFINITY);
  for (int32_t r = 0; r < rows; ++r) {
    const VisibleKeys keys = visible_keys(v.pattern, v.q_pos + r / group, v.kv_rows, v.list);
    for (int half = 0; half < kPanel; half += kLanes) {
      const IntVec key = lane + (key_begin + half);
      const IntVec seen = (key <= keys.last) & ((key < keys.sink) | (key >= keys.begin));
      float* s = scores + r * kPanel + half;
      store(s, seen ? load(s) : hidden);
    }
  }
}

// Second pass. Writes grad_k and grad_v of one key block of a sequence head, whose tiles are views[num_views].
template <typename Op, typename T>
void keys_backward(const AttendBackwardParams& b, const TileView* views, const RowStats* stats, int32_t num_views,
                   int32_t block, float* scratch) {
  using Unit = typename Op::Unit;
  const AttendParams& p = b.forward;
  const TileView& any = views[0];
  const KeyRange keys = keys_of(any, block);
  const int32_t group = p.group(), dim = p.head_dim;
  const int64_t stride = padded_dim(p) + kLanes;
  const int32_t dim_units = dim / Op::kPerUnit;
  const int32_t max_rows = tile_rows(p), panels = ceil_div(keys.size, kPanel);
  Scratch memory{scratch};
  Unit* const k = memory.take<Unit>(kKvBlock * dim_units);       // [panels][dim_units][kPanel]
  Unit* const values = memory.take<Unit>(kKvBlock * dim_units);  // the same
  float* const dk = memory.take(kKvBlock * stride);
  float* const dv = memory.take(kKvBlock * stride);
  Unit* const staging = memory.take<Unit>(2 * kPanel * stride);
  float* const q = memory.take(max_rows * stride);
  float* const dout = memory.take(max_rows * stride);
  Unit* const q_units = memory.take<Unit>(max_rows * stride);
  Unit* const dout_units = memory.take<Unit>(max_rows * stride);
  float* const probs = memory.take(max_rows * kPanel);
  float* const dscores = memory.take(max_rows * kPanel);

  for (int32_t panel = 0; panel < panels; ++panel) {
    clear_rows(staging, stride, int32_t(stride), 0, 2 * kPanel);
    for (int32_t i = 0; i < kPanel && panel * kPanel + i < keys.size; ++i) {
      const int32_t key = keys.begin + panel * kPanel + i;
      Op::pack_keys(kv_row<T>(p.kv, p.kv.k, any, key), dim, staging + i * stride);
      Op::pack_keys(kv_row<T>(p.kv, p.kv.v, any, key), dim, staging + (kPanel + i) * stride);
    }
    transpose_panel(staging, stride, dim_units, k + int64_t(panel) * dim_units * kPanel);
    transpose_panel(staging + kPanel * stride, stride, dim_units, values + int64_t(panel) * dim_units * kPanel);
  }
  clear_rows(dk, stride, int32_t(stride), 0, kKvBlock);
  clear_rows(dv, stride, int32_t(stride), 0, kKvBlock);
  clear_rows(q, stride, int32_t(stride), 0, max_rows);  // columns beyond head_dim stay 0
  clear_rows(dout, stride, int32_t(stride), 0, max_rows);
  const float scale = p.scale, scale2 = p.scale * kLog2e;

  for (int32_t n = 0; n < num_views; ++n) {
    const TileView& v = views[n];
    if (!contains(v.blocks, block)) continue;
    const int32_t rows = v.q_rows.size() * group, padded = round_up(rows, kStepRows);
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t row = v.q_rows.begin + r / group, head = v.tile.kv_head * group + r % group;
      const T* query = q_row<T>(p, v.tile, row, head);
      const T* grad = row_of<const T>(b.grad_out, v.tile.seq, row, head);
      pack_row(query, dim, q + r * stride);
      pack_row(grad, dim, dout + r * stride);
      Op::pack_keys(query, dim, q_units + r * stride);
      Op::pack_keys(grad, dim, dout_units + r * stride);
    }
    clear_rows(q_units, stride, dim_units, rows, padded);
    clear_rows(dout_units, stride, dim_units, rows, padded);
    for (int32_t panel = 0; panel < panels; ++panel) {
      const int32_t column = panel * kPanel;
      const KeyRange seen{keys.begin + column, flux::min_of(kPanel, keys.size - column)};
      const PanelRows all{v.q_pos, v.q_pos_end(), nullptr, nullptr};
      if (sees_nothing(v, all, seen)) continue;
      for (int32_t r = 0; r < padded; r += kStepRows) {
        Accumulators s;
        multiply_rows<Op>(q_units + r * stride, stride, k + int64_t(column) * dim_units, dim_units, s);
        store_step(s, scale2, probs + r * kPanel);
      }
      if (v.mask()(seen.begin, seen.begin + kPanel)) mask_keys(v, group, padded, seen.begin, probs);
      for (int32_t r = 0; r < padded; r += kStepRows) {
        Accumulators dp;
        multiply_rows<Op>(dout_units + r * stride, stride, values + int64_t(column) * dim_units, dim_units, dp);
        for (int i = 0; i < kStepRows; ++i)
          for (int half = 0; half < 2; ++half) {
            float* s = probs + (r + i) * kPanel + half * kLanes;
            const Vec prob = exp2_of(load(s) - stats[n].lse[r + i]);
            store(s, prob);
            store(dscores + (r + i) * kPanel + half * kLanes, prob * (dp.c[i][half] - stats[n].delta[r + i]) * scale);
          }
      }
      add_transposed(probs, dout, stride, rows, seen.size, dim, dv + column * stride, stride);
      add_transposed(dscores, q, stride, rows, seen.size, dim, dk + column * stride, stride);
    }
  }
  for (int32_t j = 0; j < keys.size; ++j) {
    const int32_t row = any.kv_rows.begin + keys.begin + j;
    write_row(dk + j * stride, dim, row_of<T>(b.grad_k, any.tile.seq, row, any.tile.kv_head));
    write_row(dv + j * stride, dim, row_of<T>(b.grad_v, any.tile.seq, row, any.tile.kv_head));
  }
}

}  // namespace flux::cpu::FLUX_ISA
