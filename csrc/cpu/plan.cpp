// Stage 2: lengths, routes and patterns to one work range per worker.
#include "cpu/cpu.h"

namespace flux::cpu {

Plan plan(const ProblemShape& shape, const TileShape& tile_shape, int num_workers) {
  Plan p;
  p.cost.push_back(0);
  for (int32_t b = 0; b < shape.batch; ++b)
    for (int32_t h = 0; h < shape.num_kv_heads; ++h)
      for (int32_t m = tiles_in_seq_head(shape, tile_shape, b, h) - 1; m >= 0; --m) {
        p.tiles.push_back({b, h, m});
        p.cost.push_back(p.cost.back() + tile_cost(view_tile(shape, tile_shape, p.tiles.back())));
      }
  const auto num_tiles = int32_t(p.tiles.size());
  for (int w = 0; w < num_workers; ++w) p.ranges.push_back(work_range(p.cost.data(), num_tiles, w, num_workers));
  return p;
}

}  // namespace flux::cpu
