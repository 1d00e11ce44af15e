// Stage 3 and 4: workers run tiles x key blocks; cut tiles are merged.
#include <cmath>
#include <vector>

#include "core/softmax_state.h"
#include "cpu/cpu.h"
#include "cpu/element.h"
#include "cpu/rows.h"

namespace flux::cpu {
namespace {

constexpr int32_t kQTokens = 16, kKvBlock = 64;

// The running result of a tile's rows (row = query * group + head of the group).
struct TileState {
  std::vector<SoftmaxState> rows;
  std::vector<float> out;  // [rows, D], not normalised
};

template <typename T>
void attend_block(const AttendParams& p, const TileView& v, int32_t block, TileState& state) {
  const int32_t group = p.shape.group(), dim = p.shape.head_dim;
  const int32_t begin = block * kKvBlock, end = min_of(begin + kKvBlock, v.kv_rows.size());
  const bool masked = v.masked(begin, begin + kKvBlock);
  for (int32_t r = 0; r < v.q_rows.size() * group; ++r) {
    const T* q = q_row<T>(p, v.tile, v.q_rows.begin + r / group, v.tile.kv_head * group + r % group);
    SoftmaxState& s = state.rows[r];
    float* out = state.out.data() + r * dim;
    for (int32_t j = begin; j < end; ++j) {
      if (masked && !v.sees(r / group, j)) continue;
      const T* k = kv_row<T>(p, p.k, p.k_stride, v, j);
      const T* value = kv_row<T>(p, p.v, p.v_stride, v, j);
      float score = 0.f;
      for (int32_t d = 0; d < dim; ++d) score += to_float(q[d]) * to_float(k[d]);
      score *= p.scale * kLog2e;
      const MergeFactors f = s.merge({score, 1.f});
      for (int32_t d = 0; d < dim; ++d) out[d] = out[d] * f.ours + to_float(value[d]) * f.theirs;
    }
  }
}

template <typename T>
void write_tile(const AttendParams& p, const TileView& v, const TileState& state) {
  const int32_t group = p.shape.group(), dim = p.shape.head_dim;
  for (int32_t r = 0; r < v.q_rows.size() * group; ++r) {
    const int32_t row = v.q_rows.begin + r / group, head = v.tile.kv_head * group + r % group;
    T* out = out_row<T>(p, v.tile, row, head);
    const float norm = state.rows[r].normalizer();
    for (int32_t d = 0; d < dim; ++d) from_float(state.out[r * dim + d] * norm, out[d]);
    lse_at(p, v.tile, row, head) = state.rows[r].lse();
  }
}

template <typename T>
void attend_typed(const AttendParams& p, const Executor& executor) {
  const TileShape shape{kQTokens, kKvBlock};
  const Plan work = plan(p.shape, shape, executor.num_workers());
  const int32_t group = p.shape.group(), dim = p.shape.head_dim;
  std::vector<TileState> partials(2 * work.ranges.size());
  executor.run(int64_t(work.ranges.size()), [&](int64_t w) {
    const WorkRange& range = work.ranges[w];
    if (empty(range)) return;
    for (int32_t t = range.tile; t < tiles_end(range); ++t) {
      const TileView v = view_tile(p.shape, shape, work.tiles[t]);
      const TileSpan span = tile_span(range, t, v.blocks.size());
      const int32_t rows = v.q_rows.size() * group;
      TileState state{std::vector<SoftmaxState>(rows), std::vector<float>(size_t(rows) * dim)};
      for (int32_t i = span.begin; i < span.end; ++i) attend_block<T>(p, v, v.blocks[i], state);
      if (span.split)
        partials[partial_slot(range, int32_t(w), t)] = std::move(state);
      else
        write_tile<T>(p, v, state);
    }
  });
  // Combine: whoever holds the first piece of a cut tile merges the others.
  executor.run(int64_t(work.ranges.size()), [&](int64_t w) {
    const int32_t t = leads_tile(work.ranges[w]);
    if (t < 0) return;
    const TileView v = view_tile(p.shape, shape, work.tiles[t]);
    TileState state = std::move(partials[partial_slot(work.ranges[w], int32_t(w), t)]);
    for (int32_t x = int32_t(w) + 1, done = work.ranges[w].end_block; done < v.blocks.size(); ++x) {
      if (empty(work.ranges[x])) continue;
      const TileState& piece = partials[partial_slot(work.ranges[x], x, t)];
      for (size_t r = 0; r < state.rows.size(); ++r) {
        const MergeFactors f = state.rows[r].merge(piece.rows[r]);
        for (int32_t d = 0; d < dim; ++d)
          state.out[r * dim + d] = state.out[r * dim + d] * f.ours + piece.out[r * dim + d] * f.theirs;
      }
      done = tile_span(work.ranges[x], t, v.blocks.size()).end;
    }
    write_tile<T>(p, v, state);
  });
}

}  // namespace

void attend(const AttendParams& p, const Executor& executor) {
  dispatch(p.dtype, [&](auto* x) { attend_typed<std::remove_pointer_t<decltype(x)>>(p, executor); });
}

const char* isa() { return "portable"; }

}  // namespace flux::cpu
