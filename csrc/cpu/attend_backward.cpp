// Gradients of q, k and v: two passes over the visible work, see backward_tile.h.
#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flux::cpu {

void attend_backward(const AttendBackwardParams& b, const Executor& executor) {
  const AttendParams& p = b.forward;
  const TileShape shape = tile_shape(p);
  const auto queries_backward = kernels().queries_backward[int(b.forward.dtype)];
  const auto keys_backward = kernels().keys_backward[int(b.forward.dtype)];
  const Plan work = plan(p, shape, 1);
  const auto num_tiles = int64_t(work.tiles.size());
  const int32_t rows = tile_rows(p);
  const Buffer memory(2 * size_t(num_tiles) * rows);
  std::vector<TileView> views(num_tiles);
  std::vector<RowStats> stats(num_tiles);
  for (int64_t t = 0; t < num_tiles; ++t) {
    views[t] = view_tile(p, shape, work.tiles[t]);
    float* row_stats = memory.data() + 2 * t * rows;
    stats[t] = {row_stats, row_stats + rows};
  }
  run_dynamic(executor, num_tiles, backward_scratch(p),
              [&](int64_t t, float* scratch) { queries_backward(b, views[t], scratch, stats[t]); });

  // The key blocks of every sequence head that has queries; the others have gradient 0, as they were handed over.
  struct Keys {
    int64_t first_tile;
    int32_t num_tiles, block;
  };
  std::vector<Keys> jobs;
  for (int64_t t = 0; t < num_tiles;) {
    const Tile& tile = work.tiles[t];
    const int32_t count = tiles_in_seq_head(p, shape, tile.seq, tile.kv_head);
    for (int32_t n = 0; n < ceil_div(views[t].kv_rows.size(), kKvBlock); ++n) jobs.push_back({t, count, n});
    t += count;
  }
  run_dynamic(executor, int64_t(jobs.size()), backward_scratch(p), [&](int64_t i, float* scratch) {
    const Keys& j = jobs[i];
    keys_backward(b, &views[j.first_tile], &stats[j.first_tile], j.num_tiles, j.block, scratch);
  });
}

}  // namespace flux::cpu
