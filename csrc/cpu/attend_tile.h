// The attend stage on one tile, for the instruction set this file is compiled for.
//
// Many rows: queries lie across the lanes. Scores S^T = K Q^T and the output O = P V are then both products in which
// one element of the left operand is broadcast, K and V are only copied, never transposed, and the softmax of a row
// stays in its lane. Few rows (decode): lanes lie along the head dimension and K and V are read once, in place.
#pragma once

#include "core/softmax_state.h"
#include "cpu/addresses.h"
#include "cpu/kernels.h"
#include "cpu/product.h"

namespace flux::cpu::FLUX_ISA {

// Hands out pieces of a worker's scratch memory.
struct Scratch {
  float* next;
  template <typename Unit = float>
  FLUX_HD Unit* take(int64_t units) {
    Unit* p = reinterpret_cast<Unit*>(next);
    next += units;
    return p;
  }
};

// The keys of one kernel block.
struct KeyRange {
  int32_t begin, size;
};
FLUX_HD KeyRange keys_of(const TileView& v, int32_t block) {
  const int32_t begin = block * kKvBlock;
  return {begin, flux::min_of(kKvBlock, v.kv_rows.size() - begin)};
}

// ---- many rows ----

// kPanel neighbouring rows of a tile: what they may see.
struct PanelRows {
  int32_t q_begin, q_end;    // positions
  const int32_t* pos;        // [kPanel] position, -1 in padding
  const int32_t* first_key;  // [kPanel] the first key a row sees beyond the sink
};

FLUX_HD QueryRange range_of(const TileView& v, const PanelRows& rows) {
  return {v.pattern, v.list, v.kv_rows, rows.q_begin, rows.q_end};
}
FLUX_HD bool sees_nothing(const TileView& v, const PanelRows& rows, const KeyRange& keys) {
  return sees_none(range_of(v, rows), keys.begin, keys.begin + keys.size);
}
FLUX_HD bool needs_mask(const TileView& v, const PanelRows& rows, const KeyRange& keys) {
  return TileMask(range_of(v, rows))(keys.begin, keys.begin + kKvBlock);
}

// Rows across the lanes: which of them see a key? `first`: their first keys beyond the sink.
FLUX_HD IntVec rows_that_see(const Pattern& p, IntVec pos, IntVec first, int32_t key) {
  const IntVec begin = key < p.sink ? IntVec{} : first;
  return (pos >= key) & (begin <= key);
}

// -inf where a row does not see a key. scores: [keys.size rounded up, kPanel]
FLUX_HD void mask_panel(const Pattern& p, const PanelRows& rows, const KeyRange& keys, int32_t padded, float* scores) {
  const Vec hidden = broadcast(-INFINITY);
  for (int half = 0; half < kPanel; half += kLanes) {
    const auto pos = load_as<IntVec>(rows.pos + half), first = load_as<IntVec>(rows.first_key + half);
    for (int32_t j = 0; j < padded; ++j) {
      float* s = scores + j * kPanel + half;
      store(s, rows_that_see(p, pos, first, keys.begin + j) ? load(s) : hidden);
    }
  }
}

FLUX_HD void find_visible(const TileView& v, int32_t group, int32_t rows, int32_t padded_rows, int32_t* pos,
                          int32_t* first_key) {
  for (int32_t r = 0; r < padded_rows; ++r) {
    pos[r] = r < rows ? v.q_pos + r / group : -1;
    first_key[r] = visible_keys(v.pattern, pos[r], v.kv_rows, v.list).begin;
  }
}

FLUX_HD PanelRows panel_rows(const TileView& v, int32_t group, int32_t row, int32_t rows, const int32_t* pos,
                             const int32_t* first_key) {
  const int32_t last = flux::min_of(row + kPanel, rows) - 1;
  return {v.q_pos + row / group, v.q_pos + last / group + 1, pos + row, first_key + row};
}

// Scores to probabilities, in place; updates the running maximum and sum, returns what the output is multiplied by.
FLUX_HD void softmax_panel(int32_t padded, float* scores, float* max, float* sum, float* rescale) {
  for (int half = 0; half < kPanel; half += kLanes) {
    float* column = scores + half;
    const Vec old_max = load(max + half);
    Vec m0 = old_max, m1 = old_max;
    for (int32_t j = 0; j < padded; j += 2) {
      m0 = max_of(load(column + j * kPanel), m0);
      m1 = max_of(load(column + (j + 1) * kPanel), m1);
    }
    const Vec new_max = max_of(m0, m1);
    const Vec base = new_max == -INFINITY ? Vec{} : new_max;  // nothing seen yet: exp2(-inf - 0) = 0
    Vec s0 = Vec{}, s1 = Vec{};
    for (int32_t j = 0; j < padded; j += 2) {
      const Vec p0 = exp2_of(load(column + j * kPanel) - base), p1 = exp2_of(load(column + (j + 1) * kPanel) - base);
      store(column + j * kPanel, p0);
      store(column + (j + 1) * kPanel, p1);
      s0 += p0;
      s1 += p1;
    }
    const Vec factor = exp2_of(old_max - base);
    store(rescale + half, factor);
    store(sum + half, load(sum + half) * factor + (s0 + s1));
    store(max + half, new_max);
  }
}

// The queries of a tile, transposed: [panels][row_units][kPanel]. staging: [kPanel][stride]
template <typename Op, typename T>
FLUX_HD void pack_queries(const AttendParams& p, const TileView& v, int32_t rows, int64_t stride,
                          typename Op::Unit* staging, typename Op::Unit* q) {
  const int32_t group = p.group(), units = row_units<Op>(p);
  clear_rows(staging, stride, int32_t(stride), 0, kPanel);  // columns beyond head_dim stay 0
  for (int32_t panel = 0; panel < ceil_div(rows, kPanel); ++panel) {
    for (int32_t i = 0; i < kPanel; ++i) {
      const int32_t r = panel * kPanel + i;
      auto* to = staging + i * stride;
      if (r < rows)
        Op::pack_keys(q_row<T>(p, v.tile, v.q_rows.begin + r / group, v.tile.kv_head * group + r % group), p.head_dim,
                      to);
      else
        clear_rows(to, stride, units, 0, 1);
    }
    transpose_panel(staging, stride, units, q + int64_t(panel) * units * kPanel);
  }
}

// Keys and values of a block, one row after the other; zeros behind the last. Columns beyond head_dim stay as they are.
template <typename Op, typename T>
FLUX_HD void pack_block(const AttendParams& p, const TileView& v, const KeyRange& keys, int64_t stride,
                        typename Op::Unit* k, typename Op::Unit* values) {
  const int32_t padded = round_up(keys.size, Op::kKeyStep);
  for (int32_t j = 0; j < keys.size; ++j)
    Op::pack_keys(kv_row<T>(p.kv, p.kv.k, v, keys.begin + j), p.head_dim, k + j * stride);
  clear_rows(k, stride, row_units<Op>(p), keys.size, padded);
  Op::pack_values([&](int32_t j) { return kv_row<T>(p.kv, p.kv.v, v, keys.begin + j); }, keys.size, p.head_dim, stride,
                  values);
  clear_rows(values, stride, padded_dim(p), ceil_div(keys.size, Op::kPerUnit), padded / Op::kPerUnit);
}

// Scores to probabilities, in place, and what they add to the running result of the panel's `rows`: max and sum, and
// out [rows, out_stride].
template <typename Op>
FLUX_HD void attend_panel(float* scores, int32_t padded_keys, const typename Op::Unit* values, int64_t stride,
                          int32_t rows, int32_t dim, typename Op::Unit* probabilities, float* max, float* sum,
                          float* out, int32_t out_stride) {
  float rescale[kPanel];
  softmax_panel(padded_keys, scores, max, sum, rescale);
  const auto* left = Op::pack_probabilities(scores, padded_keys, probabilities);
  Op::add_values(left, values, stride, padded_keys / Op::kPerUnit, flux::min_of(rows, kPanel), dim, rescale, out,
                 out_stride);
}

template <typename Op, typename T>
void attend_many(const AttendParams& p, const TileView& v, int32_t begin, int32_t end, float* scratch,
                 const TileState& state) {
  using Unit = typename Op::Unit;
  const int32_t group = p.group(), dim = p.head_dim, dim_units = row_units<Op>(p);
  const int32_t rows = v.q_rows.size() * group, panels = ceil_div(rows, kPanel), padded_rows = panels * kPanel;
  const int32_t out_stride = padded_dim(p);
  const int64_t stride = out_stride + kLanes;  // not a power of two: neighbouring rows share no cache set
  Scratch memory{scratch};
  Unit* const q = memory.take<Unit>(int64_t(padded_rows) * dim_units);
  Unit* const k = memory.take<Unit>(kKvBlock * stride);
  Unit* const values = memory.take<Unit>(kKvBlock * stride);
  Unit* const staging = memory.take<Unit>(kPanel * stride);
  float* const scores = memory.take(kKvBlock * kPanel);
  Unit* const probabilities = memory.take<Unit>(kKvBlock * kPanel);
  float* const max = memory.take(padded_rows);
  float* const sum = memory.take(padded_rows);
  int32_t* const pos = memory.take<int32_t>(padded_rows);
  int32_t* const first_key = memory.take<int32_t>(padded_rows);

  [[maybe_unused]] const typename Op::Registers registers;
  clear_rows(k, stride, int32_t(stride), 0, kKvBlock);
  clear_rows(values, stride, int32_t(stride), 0, kKvBlock);
  pack_queries<Op, T>(p, v, rows, stride, staging, q);
  find_visible(v, group, rows, padded_rows, pos, first_key);
  for (int32_t r = 0; r < padded_rows; ++r) max[r] = -INFINITY, sum[r] = 0.f;
  std::memset(state.out, 0, size_t(padded_rows) * out_stride * sizeof(float));

  for (int32_t n = begin; n < end; ++n) {
    const KeyRange keys = keys_of(v, v.blocks[n]);
    const int32_t padded = round_up(keys.size, Op::kKeyStep);
    pack_block<Op, T>(p, v, keys, stride, k, values);
    for (int32_t row = 0; row < padded_rows; row += kPanel) {
      const PanelRows seen = panel_rows(v, group, row, rows, pos, first_key);
      if (sees_nothing(v, seen, keys)) continue;
      Op::score(k, stride, q + int64_t(row) * dim_units, dim_units, padded, p.scale * kLog2e, scores);
      if (needs_mask(v, seen, keys)) mask_panel(v.pattern, seen, keys, padded, scores);
      attend_panel<Op>(scores, padded, values, stride, rows - row, dim, probabilities, max + row, sum + row,
                       state.out + int64_t(row) * out_stride, out_stride);
    }
  }
  for (int32_t r = 0; r < rows; ++r) state.rows[r] = {max[r], sum[r]};
}

// ---- few rows ----

// scores[r][j] = q[r] . k[j] for kRows rows and 4 keys, one key after the other: the order in which they lie in memory
// is the one that the processor's prefetcher follows.
template <int kRows, typename T>
FLUX_HD void few_scores(const float* q, int64_t q_stride, const T* const* k, int32_t dim, float scale, float* scores) {
  Vec c[kRows][4] = {};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    for (int32_t d = 0; d < dim; d += kLanes) {
      const Vec x = load(k[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) c[r][j] += load(q + r * q_stride + d) * x;
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) scores[r * kKvBlock + j] = sum_of_lanes(c[r][j]) * scale;
}

// out[r] = out[r] * rescale[r] + p[r] v for kRows rows and kVecs * kLanes columns.
template <int kRows, int kVecs, typename T>
FLUX_HD void few_values(const float* p, const float* rescale, const T* const* v, int32_t d, int32_t keys, float* out,
                        int64_t out_stride) {
  Vec c[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) c[r][i] = load(out + r * out_stride + d + i * kLanes) * rescale[r];
  for (int32_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      const Vec x = load(v[j] + d + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) c[r][i] += p[r * kKvBlock + j] * x;
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) store(out + r * out_stride + d + i * kLanes, c[r][i]);
}

// One block of keys against all rows; `dim` is a multiple of kLanes, k holds `padded` (a multiple of 4) pointers.
template <int kRows, typename T>
FLUX_HD void few_rows_scores(int32_t r, const float* q, int64_t stride, const T* const* k, int32_t padded, int32_t dim,
                             float scale, float* scores) {
  for (int32_t j = 0; j < padded; j += 4)
    few_scores<kRows>(q + r * stride, stride, k + j, dim, scale, scores + r * kKvBlock + j);
}
template <int kRows, typename T>
FLUX_HD void few_rows_values(int32_t r, const float* scores, const float* rescale, const T* const* v, int32_t keys,
                             int32_t dim, float* out, int64_t stride) {
  constexpr int kVecs = kRegisters == 32 ? 4 : 2;
  int32_t d = 0;
  for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
    few_values<kRows, kVecs>(scores + r * kKvBlock, rescale + r, v, d, keys, out + r * stride, stride);
  for (; d < dim; d += kLanes)
    few_values<kRows, 1>(scores + r * kKvBlock, rescale + r, v, d, keys, out + r * stride, stride);
}

template <typename T>
FLUX_HD void few_block(const float* q, int64_t stride, int32_t rows, int32_t dim, const T* const* k, const T* const* v,
                       const TileView& view, int32_t group, const KeyRange& keys, float scale, float* scores,
                       const TileState& state, int64_t out_stride) {
  const int32_t padded = round_up(keys.size, 4);
  int32_t r = 0;
  for (; r + 4 <= rows; r += 4) few_rows_scores<4>(r, q, stride, k, padded, dim, scale, scores);
  for (; r + 2 <= rows; r += 2) few_rows_scores<2>(r, q, stride, k, padded, dim, scale, scores);
  for (; r < rows; ++r) few_rows_scores<1>(r, q, stride, k, padded, dim, scale, scores);

  const bool masked = view.mask()(keys.begin, keys.begin + kKvBlock);
  float rescale[kFewRows];
  for (r = 0; r < rows; ++r) {
    float* s = scores + r * kKvBlock;
    for (int32_t j = keys.size; j < kKvBlock; ++j) s[j] = -INFINITY;
    if (masked)
      for (int32_t j = 0; j < keys.size; ++j)
        if (!view.sees(r / group, keys.begin + j)) s[j] = -INFINITY;
    Vec m = broadcast(-INFINITY);
    for (int32_t j = 0; j < kKvBlock; j += kLanes) m = max_of(load(s + j), m);
    SoftmaxState& row = state.rows[r];
    const float block_max = max_of_lanes(m), new_max = block_max > row.max ? block_max : row.max;
    const float base = new_max == -INFINITY ? 0.f : new_max;
    Vec sum = Vec{};
    for (int32_t j = 0; j < kKvBlock; j += kLanes) {
      const Vec e = exp2_of(load(s + j) - base);
      store(s + j, e);
      sum += e;
    }
    rescale[r] = exp2_of(broadcast(row.max - base))[0];
    row.sum = row.sum * rescale[r] + sum_of_lanes(sum);
    row.max = new_max;
  }

  r = 0;
  for (; r + 4 <= rows; r += 4) few_rows_values<4>(r, scores, rescale, v, keys.size, dim, state.out, out_stride);
  for (; r + 2 <= rows; r += 2) few_rows_values<2>(r, scores, rescale, v, keys.size, dim, state.out, out_stride);
  for (; r < rows; ++r) few_rows_values<1>(r, scores, rescale, v, keys.size, dim, state.out, out_stride);
}

// Where the keys and values of a block are. Beyond the last key: that key again, to be masked.
template <typename T>
struct BlockRows {
  const T* k[kKvBlock];
  const T* v[kKvBlock];

  FLUX_HD void find(const AttendParams& p, const TileView& view, const KeyRange& keys) {
    for (int32_t j = 0; j < kKvBlock; ++j) {
      const int32_t key = keys.begin + flux::min_of(j, keys.size - 1);
      k[j] = kv_row<T>(p.kv, p.kv.k, view, key);
      v[j] = kv_row<T>(p.kv, p.kv.v, view, key);
    }
  }
};

template <typename T>
void attend_few(const AttendParams& p, const TileView& v, int32_t begin, int32_t end, float* scratch,
                const TileState& state) {
  const int32_t group = p.group(), dim = p.head_dim, rows = v.q_rows.size() * group;
  const int32_t stride = padded_dim(p);
  const bool in_place = dim % kLanes == 0;  // else rows are copied, so that no load leaves its row
  Scratch memory{scratch};
  float* const q = memory.take(kFewRows * stride);
  float* const scores = memory.take(kFewRows * kKvBlock);
  float* const k_copy = memory.take(in_place ? 0 : kKvBlock * stride);
  float* const v_copy = memory.take(in_place ? 0 : kKvBlock * stride);
  std::memset(scratch, 0, size_t(memory.next - scratch) * sizeof(float));
  std::memset(state.out, 0, size_t(rows) * stride * sizeof(float));
  for (int32_t r = 0; r < rows; ++r) {
    pack_row(q_row<T>(p, v.tile, v.q_rows.begin + r / group, v.tile.kv_head * group + r % group), dim, q + r * stride);
    state.rows[r] = {-INFINITY, 0.f};
  }
  const float scale = p.scale * kLog2e;
  BlockRows<T> now;
  for (int32_t n = begin; n < end; ++n) {
    const KeyRange keys = keys_of(v, v.blocks[n]);
    now.find(p, v, keys);
    if (in_place) {
      few_block(q, stride, rows, dim, now.k, now.v, v, group, keys, scale, scores, state, stride);
      continue;
    }
    const float* k_copies[kKvBlock];
    const float* v_copies[kKvBlock];
    for (int32_t j = 0; j < kKvBlock; ++j) {
      pack_row(now.k[j], dim, k_copy + j * stride);
      pack_row(now.v[j], dim, v_copy + j * stride);
      k_copies[j] = k_copy + j * stride;
      v_copies[j] = v_copy + j * stride;
    }
    few_block(q, stride, rows, round_up(dim, kLanes), k_copies, v_copies, v, group, keys, scale, scores, state, stride);
  }
}

template <typename Op, typename T>
void attend_tile(const AttendParams& p, const TileView& v, int32_t begin, int32_t end, float* scratch,
                 const TileState& state) {
  if (v.q_rows.size() * p.group() <= kFewRows)
    attend_few<T>(p, v, begin, end, scratch, state);
  else
    attend_many<Op, T>(p, v, begin, end, scratch, state);
}

}  // namespace flux::cpu::FLUX_ISA
