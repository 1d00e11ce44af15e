// Stage 3: workers run tiles x key blocks.
#include "cpu/combine.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flux::cpu {

void attend(const AttendParams& p, const Executor& executor) {
  const TileShape shape = tile_shape(p.shape);
  const Plan work = plan(p.shape, shape, executor.num_workers());
  const auto attend_tile = kernels().attend[int(p.dtype)];
  const size_t rows = tile_rows(p.shape), out_size = rows * padded_dim(p.shape);
  std::vector<Partial> partials(2 * work.ranges.size());
  executor.run(int64_t(work.ranges.size()), [&](int64_t w) {
    const WorkRange& range = work.ranges[w];
    if (empty(range)) return;
    const Buffer scratch(attend_scratch(p.shape)), out(out_size);
    std::vector<SoftmaxState> states(rows);
    for (int32_t t = range.tile; t < tiles_end(range); ++t) {
      const TileView v = view_tile(p.shape, shape, work.tiles[t]);
      const TileSpan span = tile_span(range, t, v.blocks.size());
      TileState state{states.data(), out.data()};
      if (span.split) {
        Partial& partial = partials[partial_slot(range, int32_t(w), t)];
        partial.rows.resize(rows);
        partial.out.resize(out_size);
        state = {partial.rows.data(), partial.out.data()};
      }
      attend_tile(p, v, span.begin, span.end, scratch.data(), state);
      if (!span.split) write_tile(p, v, state);
    }
  });
  combine(p, shape, work, partials, executor);
}

}  // namespace flux::cpu
