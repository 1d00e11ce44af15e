// Stage 3: workers run tiles x key blocks.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "cpu/combine.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flux::cpu {

void attend(const AttendParams& p, const Executor& executor) {
  const TileShape shape = tile_shape(p);
  const Plan work = plan(p, shape, executor.num_workers());
  const auto attend_tile = kernels().attend[int(p.dtype)];
  const size_t rows = tile_rows(p), out_size = rows * padded_dim(p);
  std::vector<Partial> partials(2 * work.ranges.size());
  executor.run(int64_t(work.ranges.size()), [&](int64_t w) {
    const WorkRange& range = work.ranges[w];
    if (empty(range)) return;
    const Buffer scratch(attend_scratch(p)), out(out_size);
    std::vector<SoftmaxState> states(rows);
    for (int32_t t = range.tile; t < tiles_end(range); ++t) {
      const TileView v = view_tile(p, shape, work.tiles[t]);
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

Explanation explain(const AttendParams& p, const Executor& executor) {
  const char* name = isa();
  const TileShape shape = tile_shape(p);
  const int64_t most_rows = int64_t(p.q.max_len) * p.group(), workers = executor.num_workers();
  const int64_t rows = tile_rows(p), result = rows * padded_dim(p);
  Explanation e;
  if (most_rows == 0 || p.batch == 0) return e;
  e.processor =
      std::find_if(kIsaNames, std::end(kIsaNames), [&](const char* n) { return !std::strcmp(n, name); }) - kIsaNames;
  e.decode = most_rows <= kFewRows;
  e.tile_rows = rows;
  e.q_tokens = shape.q_tokens;
  e.kv_block = shape.kv_block;
  e.head_dim = padded_dim(p);
  e.workers = workers;
  // Of each worker the result of a tile, and two partials.
  e.workspace_bytes = e.workers * (int64_t(sizeof(float)) * (int64_t(attend_scratch(p)) + 3 * result) +
                                   3 * int64_t(sizeof(SoftmaxState)) * rows);
  return e;
}

}  // namespace flux::cpu
