// The mixture (1 - w) * full + w * sparse of two patterns on the same queries and keys, in one walk over the keys.
//
// A key that a query sees belongs to one of three sets: seen by both patterns, by the full one alone, or by the sparse
// one alone. Each set has a softmax of its own, and what a branch gives is the merge of the sets that it sees, so that
// no score, exponential or product is computed twice. (Where the sparse pattern lies within the full one, as most do,
// the third set is empty.)
#pragma once

#include <cmath>

#include "core/params.h"
#include "core/schedule.h"
#include "core/softmax_state.h"

namespace flux {

// What a mixture has besides the parts of AttendParams, whose `out` and `lse` are those of the full branch, and whose
// route is not looked at.
struct Mixture {
  const float* weight = nullptr;  // [B] or [B, Hkv], of the sparse branch
  int64_t stride_b = 0, stride_h = 0;
  MutableView sparse_out;       // as out
  float* sparse_lse = nullptr;  // as lse
  MutableView mixed;            // as out; the backward pass does not read it
  // Of the backward pass: as weight; every sequence head adds to its entry.
  float* grad_weight = nullptr;
  int64_t grad_stride_b = 0, grad_stride_h = 0;

  FLUX_HD float weight_of(int32_t b, int32_t h) const { return weight[b * stride_b + h * stride_h]; }
};

enum KeySet { kSeenByBoth, kSeenByFullOnly, kSeenBySparseOnly, kKeySets };

// What some queries see of some keys.
enum class Coverage { kNone, kSome, kAll };

// The same of the keys of a set. kSome may turn out to be none.
FLUX_HD Coverage coverage(KeySet set, Coverage full, Coverage sparse) {
  const Coverage by = set == kSeenBySparseOnly ? sparse : full, other = set == kSeenBySparseOnly ? full : sparse;
  if (by == Coverage::kNone) return Coverage::kNone;
  if (set == kSeenByBoth) return other == Coverage::kAll ? by : other == Coverage::kNone ? other : Coverage::kSome;
  return other == Coverage::kAll ? Coverage::kNone : other == Coverage::kNone ? by : Coverage::kSome;
}

// A tile as the two patterns see it. One pattern alone is a mixture too: its other view visits no blocks.
struct Branches {
  TileView full, sparse;
};

FLUX_HD Branches view_branches(const AttendParams& p, const TileShape& shape, const Tile& t) {
  return {view_tile(p, shape, t, 0), view_tile(p, shape, t, 1)};
}

// The key blocks that either branch visits, ascending:
//
//   for (BothBlocks blocks(branches); blocks.more(); blocks.next()) ...
struct BothBlocks {
  const KvBlocks &full, &sparse;
  int32_t next_full = 0, next_sparse = 0;
  int32_t block = 0;
  bool in_full = false, in_sparse = false;

  FLUX_HD explicit BothBlocks(const Branches& b) : full(b.full.blocks), sparse(b.sparse.blocks) { find(); }
  FLUX_HD bool more() const { return in_full || in_sparse; }
  FLUX_HD void next() {
    next_full += in_full;
    next_sparse += in_sparse;
    find();
  }

 private:
  FLUX_HD void find() {
    in_full = next_full < full.size();
    in_sparse = next_sparse < sparse.size();
    if (in_full && in_sparse) {
      const int32_t f = full[next_full], s = sparse[next_sparse];
      in_full = f <= s;
      in_sparse = s <= f;
    }
    if (more()) block = in_full ? full[next_full] : sparse[next_sparse];
  }
};

// How the keys of a set take part in the gradients of a row: P = share exp2(score - lse), dS = P (dP - delta).
struct SetGradient {
  float lse = INFINITY;  // times log2(e); +inf where there is no such key
  float share = 0.f;
  float delta = 0.f;
};

// Of the keys that one branch alone sees: `weight` is the branch's, lse times log2(e), `delta` grad_out . (its output).
FLUX_HD SetGradient seen_by_one(float weight, float lse, float delta) {
  if (lse == -INFINITY) return {};
  return {lse, weight, delta};
}

// Of the keys that both see: the sum of the two branches, relative to the smaller lse, which no such score exceeds.
FLUX_HD SetGradient seen_by_both(float full_weight, float full_lse, float full_delta, float sparse_weight,
                                 float sparse_lse, float sparse_delta) {
  if (full_lse == -INFINITY || sparse_lse == -INFINITY) return {};
  const float lse = sparse_lse < full_lse ? sparse_lse : full_lse;
  const float full = full_weight * exp2f(lse - full_lse), sparse = sparse_weight * exp2f(lse - sparse_lse);
  const float share = full + sparse;
  // The mean of the deltas, in the form that is exact where they are equal.
  const float towards_sparse = share == 0.f ? 0.f : sparse / share;
  return {lse, share, full_delta + towards_sparse * (sparse_delta - full_delta)};
}

}  // namespace flux
