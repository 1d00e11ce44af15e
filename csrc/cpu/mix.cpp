// The mixture of two patterns: whole tiles, one walk over the keys of each (core/mixture.h).
#include <type_traits>
#include <vector>

#include "core/mixture.h"
#include "cpu/addresses.h"
#include "cpu/cpu.h"
#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace flux::cpu {
namespace {

// A branch of a row: its softmax, and the factors with which the unnormalised outputs of two sets make up its output.
struct BranchOfRow {
  SoftmaxState state;
  float both, alone;

  BranchOfRow(const SoftmaxState& seen_by_both, const SoftmaxState& seen_alone, bool sees_any) : state(seen_by_both) {
    const MergeFactors f = state.merge(seen_alone);
    both = sees_any ? f.ours / state.sum : 0.f;
    alone = sees_any ? f.theirs / state.sum : 0.f;
  }
};

template <typename T>
void write_rows(const AttendParams& p, const Mixture& m, const Branches& v, const TileState* sets) {
  const int32_t group = p.group();
  const Tile& tile = v.full.tile;
  const float w = m.weight_of(tile.seq, tile.kv_head);
  for (int32_t r = 0; r < v.full.q_rows.size() * group; ++r) {
    const int32_t row = v.full.q_rows.begin + r / group, head = tile.kv_head * group + r % group;
    const bool full_sees = v.full.sees_any(r / group), sparse_sees = v.sparse.sees_any(r / group);
    const SoftmaxState& shared = sets[kSeenByBoth].rows[r];
    const BranchOfRow full(shared, sets[kSeenByFullOnly].rows[r], full_sees);
    const BranchOfRow sparse(shared, sets[kSeenBySparseOnly].rows[r], sparse_sees);
    const int64_t offset = int64_t(r) * padded_dim(p);
    const float* by_both = sets[kSeenByBoth].out + offset;
    const float* by_full = sets[kSeenByFullOnly].out + offset;
    const float* by_sparse = sets[kSeenBySparseOnly].out + offset;
    T* out = out_row<T>(p, tile, row, head);
    T* sparse_out = row_of<T>(m.sparse_out, tile.seq, row, head);
    T* mixed = row_of<T>(m.mixed, tile.seq, row, head);
    for (int32_t d = 0; d < p.head_dim; ++d) {
      const float f = full_sees ? by_both[d] * full.both + by_full[d] * full.alone : 0.f;
      const float s = sparse_sees ? by_both[d] * sparse.both + by_sparse[d] * sparse.alone : 0.f;
      from_float(f, out[d]);
      from_float(s, sparse_out[d]);
      from_float((1.f - w) * f + w * s, mixed[d]);
    }
    const int64_t lse = lse_offset(p, tile, row, head);
    p.lse[lse] = full.state.lse();
    m.sparse_lse[lse] = sparse.state.lse();
  }
}

}  // namespace

void mix(const AttendParams& p, const Mixture& m, const Executor& executor) {
  const TileShape shape = tile_shape(p);
  const auto mix_tile = kernels().mix[int(p.dtype)];
  const Plan work = plan(p, shape, 1);
  const size_t rows = tile_rows(p), out_size = rows * padded_dim(p), scratch_size = mix_scratch(p);
  const auto mix_one = [&](int64_t t, float* scratch) {
    const Branches v = view_branches(p, shape, work.tiles[t]);
    std::vector<SoftmaxState> states(kKeySets * rows);
    TileState sets[kKeySets];
    for (int set = 0; set < kKeySets; ++set)
      sets[set] = {states.data() + set * rows, scratch + scratch_size + set * out_size};
    mix_tile(p, v, scratch, sets);
    dispatch(p.dtype, [&](auto* x) { write_rows<std::remove_pointer_t<decltype(x)>>(p, m, v, sets); });
  };
  run_dynamic(executor, int64_t(work.tiles.size()), scratch_size + kKeySets * out_size, mix_one);
}

}  // namespace flux::cpu
