// Stage 2: lengths, routes and patterns to one work range per worker.
#include "cpu/cpu.h"

namespace flux::cpu {

Plan plan(const AttendParams& p, const TileShape& tile_shape, int num_workers) {
  Plan work;
  work.cost.push_back(0);
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.kv.num_heads; ++h)
      for (int32_t m = tiles_in_seq_head(p, tile_shape, b, h) - 1; m >= 0; --m) {
        work.tiles.push_back({b, h, m});
        work.cost.push_back(work.cost.back() + tile_cost(view_tile(p, tile_shape, work.tiles.back())));
      }
  const auto num_tiles = int32_t(work.tiles.size());
  for (int w = 0; w < num_workers; ++w) work.ranges.push_back(work_range(work.cost.data(), num_tiles, w, num_workers));
  return work;
}

}  // namespace flux::cpu
