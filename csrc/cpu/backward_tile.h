// The gradients, for the instruction set this file is compiled for.
//
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta) scale, delta = dO . O per row    (arXiv 2205.14135, section B)
//   dQ = dS K, dK = dS^T Q, dV = P^T dO
//
// Of a mixture, P and P (dP - delta) are the weighted sums of both branches. Within a set of keys (core/mixture.h) the
// branches differ by factors of the row, which SetGradient has; so the walk is the one of hard routes, where all keys
// are of one set.
//
// Two passes, each with one writer per result and a fixed order of additions, so the bits depend on nothing else: a
// tile of queries against its key blocks gives dQ (and leaves lse and delta for the second pass), a block of keys
// against the tiles that see it gives dK and dV. In both the side that stays lies across the lanes.
#pragma once

#include "cpu/mix_tile.h"

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

// kLanes entries of SetGradient.
struct GradientLanes {
  Vec lse, share, delta;

  FLUX_HD Vec probability(Vec score) const { return share * exp2_of(score - lse); }
};
FLUX_HD GradientLanes load_lanes(const RowGradients& g, int32_t row) {
  return {load(g.lse + row), load(g.share + row), load(g.delta + row)};
}
FLUX_HD GradientLanes broadcast(const SetGradient& g) {
  return {broadcast(g.lse), broadcast(g.share), broadcast(g.delta)};
}
// In each lane that of the set to which the key belongs, if it is seen at all.
FLUX_HD GradientLanes of_sets(const GradientLanes (&sets)[kKeySets], IntVec full, IntVec sparse) {
  const auto choose = [&](Vec GradientLanes::* member) {
    const Vec by_full = sparse ? sets[kSeenByBoth].*member : sets[kSeenByFullOnly].*member;
    return full ? by_full : sets[kSeenBySparseOnly].*member;
  };
  return {choose(&GradientLanes::lse), choose(&GradientLanes::share), choose(&GradientLanes::delta)};
}

// The one set to which the keys belong that are seen; kKeySets: there are several.
FLUX_HD KeySet only_set(Coverage full, Coverage sparse) {
  int found = kKeySets, count = 0;
  for (int set = 0; set < kKeySets; ++set)
    if (coverage(KeySet(set), full, sparse) != Coverage::kNone) found = set, ++count;
  return count == 1 ? KeySet(found) : kKeySets;
}

// The product of two rows, rounded as an element of dP is (gemm.h): where a row sees one key, dP - delta is 0.
template <typename T>
FLUX_HD float row_product(const T* x, const T* y, int32_t dim) {
  float sum = 0.f;
  for (int32_t d = 0; d < dim; ++d) {
#ifdef __FP_FAST_FMAF  // the compiler makes these of products of vectors, but not surely of this one
    sum = __builtin_fmaf(to_float(x[d]), to_float(y[d]), sum);
#else
    sum += to_float(x[d]) * to_float(y[d]);
#endif
  }
  return sum;
}

// Of one row: its part in `gradients`, and the gradient of the weight by it.
template <typename T>
FLUX_HD float row_gradients(const AttendBackwardParams& b, const Mixture* m, const Tile& t, int32_t row, int32_t head,
                            int32_t tile_row, const TileGradients& gradients) {
  const AttendParams& p = b.forward;
  const T* grad = row_of<const T>(b.grad_out, t.seq, row, head);
  const T* out = out_row<const T>(p, t, row, head);
  const int64_t offset = lse_offset(p, t, row, head);
  const float lse = p.lse[offset] * kLog2e, delta = row_product(out, grad, p.head_dim);
  if (!m) {
    gradients.sets[kSeenByFullOnly].set(tile_row, seen_by_one(1.f, lse, delta));
    return 0.f;
  }
  const T* sparse_out = row_of<const T>(m->sparse_out, t.seq, row, head);
  const float sparse_lse = m->sparse_lse[offset] * kLog2e, sparse_delta = row_product(sparse_out, grad, p.head_dim);
  const float sparse = m->weight_of(t.seq, t.kv_head), full = 1.f - sparse;
  gradients.sets[kSeenByFullOnly].set(tile_row, seen_by_one(full, lse, delta));
  gradients.sets[kSeenBySparseOnly].set(tile_row, seen_by_one(sparse, sparse_lse, sparse_delta));
  gradients.sets[kSeenByBoth].set(tile_row, seen_by_both(full, lse, delta, sparse, sparse_lse, sparse_delta));
  float of_weight = 0.f;
  for (int32_t d = 0; d < p.head_dim; ++d)
    of_weight += (to_float(sparse_out[d]) - to_float(out[d])) * to_float(grad[d]);
  return of_weight;
}

// First pass. Writes grad_q of the tile, and its `gradients`.
template <typename Op, typename T>
double queries_backward(const AttendBackwardParams& b, const Mixture* m, const Branches& v, float* scratch,
                        const TileGradients& gradients) {
  using Unit = typename Op::Unit;
  const AttendParams& p = b.forward;
  const Tile& tile = v.full.tile;
  const int32_t group = p.group(), dim = p.head_dim;
  const int32_t dim_units = dim / Op::kPerUnit;
  const int32_t rows = v.full.q_rows.size() * group, padded_rows = round_up(rows, kPanel);
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
  int32_t* const full_first = memory.take<int32_t>(padded_rows);
  int32_t* const sparse_first = memory.take<int32_t>(padded_rows);

  double of_weight = 0;
  for (int32_t row = 0; row < padded_rows; row += kPanel) {
    Unit* const q_rows = staging;
    Unit* const dout_rows = staging + kPanel * stride;
    clear_rows(staging, stride, int32_t(stride), 0, 2 * kPanel);
    for (int32_t i = 0; i < kPanel; ++i) {
      const int32_t r = row + i;
      if (r >= rows) {
        for (const RowGradients& set : gradients.sets)
          if (set.lse) set.set(r, {});
        continue;
      }
      const int32_t q_row_index = v.full.q_rows.begin + r / group, head = tile.kv_head * group + r % group;
      Op::pack_keys(q_row<T>(p, tile, q_row_index, head), dim, q_rows + i * stride);
      Op::pack_keys(row_of<const T>(b.grad_out, tile.seq, q_row_index, head), dim, dout_rows + i * stride);
      of_weight += row_gradients<T>(b, m, tile, q_row_index, head, r, gradients);
    }
    transpose_panel(q_rows, stride, dim_units, q + int64_t(row) * dim_units);
    transpose_panel(dout_rows, stride, dim_units, dout + int64_t(row) * dim_units);
  }
  if (m) find_visible(v.sparse, group, rows, padded_rows, pos, sparse_first);
  find_visible(v.full, group, rows, padded_rows, pos, full_first);
  clear_rows(dq, stride, int32_t(stride), 0, padded_rows);
  clear_rows(k, stride, int32_t(stride), 0, kKvBlock);  // columns beyond head_dim stay 0
  const float scale = p.scale, scale2 = p.scale * kLog2e;

  for (BothBlocks blocks(v); blocks.more(); blocks.next()) {
    const KeyRange keys = keys_of(v.full, blocks.block);
    const int32_t padded = round_up(keys.size, kStepRows);
    for (int32_t j = 0; j < keys.size; ++j) {
      const T* key = kv_row<T>(p.kv, p.kv.k, v.full, keys.begin + j);
      pack_row(key, dim, k + j * stride);
      Op::pack_keys(key, dim, k_units + j * stride);
      Op::pack_keys(kv_row<T>(p.kv, p.kv.v, v.full, keys.begin + j), dim, values + j * stride);
    }
    clear_rows(k_units, stride, dim_units, keys.size, padded);
    clear_rows(values, stride, dim_units, keys.size, padded);
    for (int32_t row = 0; row < padded_rows; row += kPanel) {
      const PanelBranches panel{v, panel_rows(v.full, group, row, rows, pos, full_first),
                                panel_rows(v.sparse, group, row, rows, pos, sparse_first), blocks.in_full,
                                blocks.in_sparse};
      const Coverage full = panel_coverage(v.full, panel.in_full, panel.full_rows, keys);
      const Coverage sparse = panel_coverage(v.sparse, panel.in_sparse, panel.sparse_rows, keys);
      if (full == Coverage::kNone && sparse == Coverage::kNone) continue;
      Op::score(k_units, stride, q + int64_t(row) * dim_units, dim_units, padded, scale2, dscores);
      const KeySet set = only_set(full, sparse);
      if (set != kKeySets && coverage(set, full, sparse) == Coverage::kSome)
        take_set(set, panel, keys, padded, dscores, dscores);
      for (int32_t j = 0; j < padded; j += kStepRows) {
        Accumulators dp;
        multiply_rows<Op>(values + j * stride, stride, dout + int64_t(row) * dim_units, dim_units, dp);
        for (int half = 0; half < 2; ++half) {
          const int32_t first = row + half * kLanes;
          float* s = dscores + j * kPanel + half * kLanes;
          if (set != kKeySets) {
            const GradientLanes g = load_lanes(gradients.sets[set], first);
            for (int i = 0; i < kStepRows; ++i)
              store(s + i * kPanel, g.probability(load(s + i * kPanel)) * (dp.c[i][half] - g.delta) * scale);
            continue;
          }
          const GradientLanes sets[kKeySets] = {load_lanes(gradients.sets[0], first),
                                                load_lanes(gradients.sets[1], first),
                                                load_lanes(gradients.sets[2], first)};
          for (int i = 0; i < kStepRows; ++i) {
            const int32_t key = keys.begin + j + i;
            const IntVec by_full = panel.full_sees(half * kLanes, key),
                         by_sparse = panel.sparse_sees(half * kLanes, key);
            const GradientLanes g = of_sets(sets, by_full, by_sparse);
            const Vec score = (by_full | by_sparse) ? load(s + i * kPanel) : broadcast(-INFINITY);
            store(s + i * kPanel, g.probability(score) * (dp.c[i][half] - g.delta) * scale);
          }
        }
      }
      add_transposed(dscores, k, stride, keys.size, flux::min_of(rows - row, kPanel), dim, dq + row * stride, stride);
    }
  }
  for (int32_t r = 0; r < rows; ++r)
    write_row(dq + r * stride, dim,
              row_of<T>(b.grad_q, tile.seq, v.full.q_rows.begin + r / group, tile.kv_head * group + r % group));
  return of_weight;
}

// Keys across the lanes, [kLanes] from key_begin: which of them does a query of the tile see? `visits`: the tile visits
// their block.
FLUX_HD IntVec keys_seen(const TileView& v, bool visits, int32_t token, int32_t key_begin) {
  if (!visits) return IntVec{};
  IntVec key;
  for (int i = 0; i < kLanes; ++i) key[i] = key_begin + i;
  const VisibleKeys keys = visible_keys(v.pattern, v.q_pos + token, v.kv_rows, v.list);
  return (key <= keys.last) & ((key < keys.sink) | (key >= keys.begin));
}

// What the queries of a tile see of a panel of keys.
FLUX_HD Coverage keys_coverage(const TileView& v, bool visits, const KeyRange& keys) {
  const PanelRows all{v.q_pos, v.q_pos_end(), nullptr, nullptr};
  if (!visits || sees_nothing(v, all, keys)) return Coverage::kNone;
  return v.mask()(keys.begin, keys.begin + kPanel) ? Coverage::kSome : Coverage::kAll;
}

// Second pass. Writes grad_k and grad_v of one key block of a sequence head, whose tiles these are.
template <typename Op, typename T>
void keys_backward(const AttendBackwardParams& b, const Branches* tiles, const TileGradients* gradients,
                   int32_t num_tiles, int32_t block, float* scratch) {
  using Unit = typename Op::Unit;
  const AttendParams& p = b.forward;
  const TileView& any = tiles[0].full;
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

  for (int32_t n = 0; n < num_tiles; ++n) {
    const TileView &full = tiles[n].full, &sparse = tiles[n].sparse;
    const bool in_full = contains(full.blocks, block), in_sparse = contains(sparse.blocks, block);
    if (!in_full && !in_sparse) continue;
    const int32_t rows = full.q_rows.size() * group, padded = round_up(rows, kStepRows);
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t row = full.q_rows.begin + r / group, head = full.tile.kv_head * group + r % group;
      const T* query = q_row<T>(p, full.tile, row, head);
      const T* grad = row_of<const T>(b.grad_out, full.tile.seq, row, head);
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
      const Coverage by_full = keys_coverage(full, in_full, seen), by_sparse = keys_coverage(sparse, in_sparse, seen);
      if (by_full == Coverage::kNone && by_sparse == Coverage::kNone) continue;
      Op::score(q_units, stride, k + int64_t(column) * dim_units, dim_units, padded, scale2, probs);
      const KeySet set = only_set(by_full, by_sparse);
      const bool masked = set == kKeySets || coverage(set, by_full, by_sparse) == Coverage::kSome;
      for (int32_t r = 0; r < padded; r += kStepRows) {
        Accumulators dp;
        multiply_rows<Op>(dout_units + r * stride, stride, values + int64_t(column) * dim_units, dim_units, dp);
        for (int i = 0; i < kStepRows; ++i) {
          const RowGradients* of = gradients[n].sets;
          GradientLanes g = broadcast(set != kKeySets ? of[set][r + i] : SetGradient{});
          for (int half = 0; half < 2; ++half) {
            float* s = probs + (r + i) * kPanel + half * kLanes;
            Vec score = load(s);
            if (masked) {
              const int32_t token = (r + i) / group, first = seen.begin + half * kLanes;
              const IntVec f = keys_seen(full, in_full, token, first), x = keys_seen(sparse, in_sparse, token, first);
              score = (f | x) ? score : broadcast(-INFINITY);
              if (set == kKeySets)
                g = of_sets({broadcast(of[0][r + i]), broadcast(of[1][r + i]), broadcast(of[2][r + i])}, f, x);
            }
            const Vec prob = g.probability(score);
            store(s, prob);
            store(dscores + (r + i) * kPanel + half * kLanes, prob * (dp.c[i][half] - g.delta) * scale);
          }
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
