#include "cpu/combine.h"

#include "cpu/addresses.h"
#include "cpu/element.h"

namespace flux::cpu {
namespace {

template <typename T>
void write_rows(const AttendParams& p, const TileView& v, const TileState& state) {
  const int32_t group = p.group(), dim = p.head_dim;
  for (int32_t r = 0; r < v.q_rows.size() * group; ++r) {
    const int32_t row = v.q_rows.begin + r / group, head = v.tile.kv_head * group + r % group;
    T* to = out_row<T>(p, v.tile, row, head);
    const float* from = state.out + int64_t(r) * padded_dim(p);
    // Where all scores are -inf the sum is 0 and the result NaN, as softmax has it.
    const bool sees = v.sees_any(r / group);  // else nothing of `from` counts: it may be 0 * NaN
    const float factor = 1.f / state.rows[r].sum;
    for (int32_t d = 0; d < dim; ++d) from_float(sees ? from[d] * factor : 0.f, to[d]);
    lse_at(p, v.tile, row, head) = state.rows[r].lse();
  }
}

}  // namespace

void write_tile(const AttendParams& p, const TileView& v, const TileState& state) {
  dispatch(p.dtype, [&](auto* x) { write_rows<std::remove_pointer_t<decltype(x)>>(p, v, state); });
}

void combine(const AttendParams& p, const TileShape& shape, const Plan& plan, std::vector<Partial>& partials,
             const Executor& executor) {
  const int32_t dim = padded_dim(p);
  executor.run(int64_t(plan.ranges.size()), [&](int64_t w) {
    const int32_t t = leads_tile(plan.ranges[w]);
    if (t < 0) return;
    const TileView v = view_tile(p, shape, plan.tiles[t]);
    Partial& sum = partials[partial_slot(plan.ranges[w], int32_t(w), t)];
    const int32_t rows = v.q_rows.size() * p.group();
    for (int32_t x = int32_t(w) + 1, done = plan.ranges[w].end_block; done < v.blocks.size(); ++x) {
      if (empty(plan.ranges[x])) continue;
      const Partial& piece = partials[partial_slot(plan.ranges[x], x, t)];
      for (int32_t r = 0; r < rows; ++r) {
        const MergeFactors f = sum.rows[r].merge(piece.rows[r]);
        float* ours = sum.out.data() + int64_t(r) * dim;
        const float* theirs = piece.out.data() + int64_t(r) * dim;
        for (int32_t d = 0; d < dim; ++d) ours[d] = ours[d] * f.ours + theirs[d] * f.theirs;
      }
      done = tile_span(plan.ranges[x], t, v.blocks.size()).end;
    }
    write_tile(p, v, {sum.rows.data(), sum.out.data()});
  });
}

}  // namespace flux::cpu
