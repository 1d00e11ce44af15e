// Block selection: the masses of the key blocks of one query block after the other, and of these the fewest that have
// the wanted share.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flux::cpu {
namespace {

// Marks what is kept of the blocks with these masses, those that one query block sees.
void keep_fewest(const StridedView& view, int32_t q_block, double threshold, const std::vector<float>& mass,
                 std::vector<char>& kept) {
  const auto blocks = int32_t(mass.size());
  const float total = std::accumulate(mass.begin(), mass.end(), 0.f);
  kept.assign(mass.size(), keeps_all(total, threshold));
  if (keeps_all(total, threshold)) return;
  std::vector<int32_t> units(mass.size()), order;
  int64_t sum = 0, have = 0;
  for (int32_t j = 0; j < blocks; ++j) {
    units[j] = share_units(mass[j], total);
    sum += units[j];
    kept[j] = view.always(q_block, j);
    if (kept[j])
      have += units[j];
    else
      order.push_back(j);
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return units[a] > units[b]; });
  const int64_t needed = units_needed(sum, threshold);
  for (auto j = order.begin(); j != order.end() && have < needed; ++j) kept[*j] = 1, have += units[*j];
}

}  // namespace

void select(const SelectParams& p, const Executor& executor) {
  const auto select_tile = kernels().select[int(p.dtype)];
  const int64_t lists = int64_t(p.batch) * p.kv.num_heads * p.q_blocks;
  run_dynamic(executor, lists, select_scratch(p), [&](int64_t list, float* scratch) {
    const auto seq_head = int32_t(list / p.q_blocks);
    // The longest first.
    const Tile t{seq_head / p.kv.num_heads, seq_head % p.kv.num_heads, p.q_blocks - 1 - int32_t(list % p.q_blocks)};
    const StridedView view(p, t.seq, t.kv_head);
    int32_t* blocks = p.blocks + p.list(t.seq, t.kv_head, t.q_block) * p.max_count;
    int32_t count = 0;
    if (t.q_block < view.q_blocks()) {
      std::vector<float> mass(view.blocks_seen(t.q_block));
      std::vector<char> kept;
      if (!mass.empty()) select_tile(p, t, scratch, mass.data());
      keep_fewest(view, t.q_block, p.threshold, mass, kept);
      for (int32_t j = 0; j < int32_t(kept.size()); ++j)
        if (kept[j]) blocks[count++] = j;
    }
    p.counts[p.list(t.seq, t.kv_head, t.q_block)] = count;
    std::fill(blocks + count, blocks + p.max_count, 0);
  });
}

}  // namespace flux::cpu
