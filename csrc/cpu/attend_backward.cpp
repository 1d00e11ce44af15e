// Gradients of q, k and v, and of a mixture's weight: two passes over the visible work, see backward_tile.h.
#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flux::cpu {
namespace {

// No mixture: hard routes.
void backward(const AttendBackwardParams& b, const Mixture* m, const Executor& executor) {
  const AttendParams& p = b.forward;
  const TileShape shape = tile_shape(p);
  const auto queries_backward = kernels().queries_backward[int(p.dtype)];
  const auto keys_backward = kernels().keys_backward[int(p.dtype)];
  const Plan work = plan(p, shape, 1);
  const auto num_tiles = int64_t(work.tiles.size());
  const int32_t rows = tile_rows(p);
  const int first_set = m ? 0 : kSeenByFullOnly, num_sets = m ? kKeySets : 1;
  const Buffer memory(3 * size_t(num_sets) * num_tiles * rows);
  std::vector<Branches> tiles(num_tiles);
  std::vector<TileGradients> gradients(num_tiles);
  std::vector<double> of_weight(num_tiles);
  for (int64_t t = 0; t < num_tiles; ++t) {
    tiles[t] = m ? view_branches(p, shape, work.tiles[t]) : Branches{view_tile(p, shape, work.tiles[t]), {}};
    for (int set = 0; set < num_sets; ++set) {
      float* of_rows = memory.data() + 3 * (num_sets * t + set) * rows;
      gradients[t].sets[first_set + set] = {of_rows, of_rows + rows, of_rows + 2 * rows};
    }
  }
  run_dynamic(executor, num_tiles, backward_scratch(p), [&](int64_t t, float* scratch) {
    of_weight[t] = queries_backward(b, m, tiles[t], scratch, gradients[t]);
  });

  // The key blocks of every sequence head that has queries; the others have gradient 0, as they were handed over.
  struct Keys {
    int64_t first_tile;
    int32_t num_tiles, block;
  };
  std::vector<Keys> jobs;
  for (int64_t t = 0; t < num_tiles;) {
    const Tile& tile = work.tiles[t];
    const int32_t count = tiles_in_seq_head(p, shape, tile.seq, tile.kv_head);
    for (int32_t n = 0; n < ceil_div(tiles[t].full.kv_rows.size(), kKvBlock); ++n) jobs.push_back({t, count, n});
    if (m) {
      double sum = 0;
      for (int64_t i = t; i < t + count; ++i) sum += of_weight[i];
      m->grad_weight[tile.seq * m->grad_stride_b + tile.kv_head * m->grad_stride_h] += float(sum);
    }
    t += count;
  }
  run_dynamic(executor, int64_t(jobs.size()), backward_scratch(p), [&](int64_t i, float* scratch) {
    const Keys& j = jobs[i];
    keys_backward(b, &tiles[j.first_tile], &gradients[j.first_tile], j.num_tiles, j.block, scratch);
  });
}

}  // namespace

void attend_backward(const AttendBackwardParams& b, const Executor& executor) { backward(b, nullptr, executor); }

void mix_backward(const AttendBackwardParams& b, const Mixture& m, const Executor& executor) {
  backward(b, &m, executor);
}

}  // namespace flux::cpu
