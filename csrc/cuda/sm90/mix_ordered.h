// The gradients of mixtures on Hopper by the kernel that adds dQ up in order (backward_ordered.h): it visits what full
// attention sees, each tile once. A pair of a row and a key counts by the numbers of its part; most tiles lie in one.
#pragma once

#include "cuda/mix_backward.h"
#include "cuda/sm90/backward_ordered.h"

namespace flux::cuda::sm90 {

// lse, delta: of the part in which the tile lies. needs_mask: it lies in none; then they are those of the sparse part,
// whose keys are `keys`.
struct MixedRows : VisitedRows<kTileRows> {
  float rest_lse[kTileRows], rest_delta[kTileRows];
};

struct OrderedMixedWalks : MixedWalks {
  using Info = MixedRows;
  static constexpr bool kKeepsPlaces = false;
  static __device__ const BackwardWorkspace& sums(const MixBackwardWorkspace& w) { return w.parts[kSparsePart]; }
  static __device__ bool contain(const MixBackwardWorkspace&, const TileView&) { return true; }

  // The rows that see all of a block of keys in a part.
  struct OfKeys {
    RowsSeeingAll sparse, rest;

    __device__ OfKeys(const AttendParams& p, const TileView& seq_head, const Span& keys)
        : sparse(seeing_all(p, seq_head, keys, kSparsePart)), rest(seeing_all(p, seq_head, keys, kRestPart)) {}

   private:
    static __device__ RowsSeeingAll seeing_all(const AttendParams& p, const TileView& seq_head, const Span& keys,
                                               Part part) {
      return {queries_seeing_all(seq_head.pattern, false, part, keys.begin, keys.end, seq_head.kv_rows.size()),
              seq_head.q_pos, seq_head.q_rows.size(), p.group()};
    }
  };

  // As RowFactsLoader, of rows that are whole queries.
  class Facts {
   public:
    CUTLASS_DEVICE Facts(const MixBackwardParams& b, const MixBackwardWorkspace& w, const TileView& seq_head,
                         const OfKeys& walk, const Span&)
        : w_(w),
          seq_head_(seq_head),
          walk_(walk),
          tokens_(kTileRows / b.forward.group()),
          own_(tile_row(b.forward, seq_head, int32_t(threadIdx.x))) {}

    CUTLASS_DEVICE void load(int32_t tile, MixedRows& rows) const {
      const int32_t i = threadIdx.x, token = tile * tokens_ + own_.token;
      const bool sparse = walk_.sparse.contain(tile * kTileRows, (tile + 1) * kTileRows);
      const bool both = !sparse && !walk_.rest.contain(tile * kTileRows, (tile + 1) * kTileRows);
      if (i == 0) rows.needs_mask = both;
      if (token < seq_head_.q_rows.size()) {
        const int64_t from = row_offset(sums(w_).row, seq_head_, {token, own_.head});
        const BackwardWorkspace& numbers = w_.parts[sparse || both ? kSparsePart : kRestPart];
        sm80::cp_async4(sm80::shared_address(&rows.lse[i]), numbers.lse + from);
        sm80::cp_async4(sm80::shared_address(&rows.delta[i]), numbers.delta + from);
        if (!both) return;
        sm80::cp_async4(sm80::shared_address(&rows.rest_lse[i]), w_.parts[kRestPart].lse + from);
        sm80::cp_async4(sm80::shared_address(&rows.rest_delta[i]), w_.parts[kRestPart].delta + from);
        rows.keys[i] = seq_head_.visible_keys(token);
      } else {
        rows.lse[i] = rows.rest_lse[i] = INFINITY, rows.delta[i] = rows.rest_delta[i] = 0.f;
        rows.keys[i] = {};
      }
    }

   private:
    const MixBackwardWorkspace& w_;
    const TileView& seq_head_;
    const OfKeys& walk_;
    const int32_t tokens_;  // of a tile
    const TileRow own_;     // of this thread, in the first tile
  };

  template <class Scores>
  static CUTLASS_DEVICE void find_probs(Scores& s, const MixedRows& rows, float scale_log2, int32_t key) {
    const int column = int(threadIdx.x % 4) * 2;
    if (!rows.needs_mask) return find_all_probs<kTileRows>(s, rows, scale_log2);
    CUTE_UNROLL
    for (int j = 0; j < kTileRows / 8; ++j) CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int row = 8 * j + column + c;
      const VisibleKeys seen = rows.keys[row];
      const float lse = rows.lse[row], rest_lse = rows.rest_lse[row];
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        const int32_t own = key + 8 * r;
        const bool sparse = (own >= seen.begin) | (own < seen.sink);
        float& x = s(4 * j + 2 * r + c);
        x = own <= seen.last ? fast_exp2(x * scale_log2 - (sparse ? lse : rest_lse)) : 0.f;
      }
    }
  }

  template <class T, class Products, class Probs>
  static CUTLASS_DEVICE void find_ds(Products& ds, const Probs& probs, const MixedRows& rows, int32_t key) {
    if (!rows.needs_mask) return sm90::find_ds<T, kTileRows>(ds, probs, rows);
    const int column = int(threadIdx.x % 4) * 2;
    CUTE_UNROLL
    for (int j = 0; j < kTileRows / 8; ++j) CUTE_UNROLL
    for (int c = 0; c < 2; ++c) {
      const int row = 8 * j + column + c;
      const VisibleKeys seen = rows.keys[row];
      const float delta = rows.delta[row], rest_delta = rows.rest_delta[row];
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        const int32_t own = key + 8 * r;
        const bool sparse = (own >= seen.begin) | (own < seen.sink);
        const float2 pair = prob_pair<T>(probs, 2 * j + r);
        float& x = ds(4 * j + 2 * r + c);
        x = (c ? pair.y : pair.x) * (x - (sparse ? delta : rest_delta));
      }
    }
  }
};

template <DType kDType>
cudaError_t launch_ordered_mix_backward(const MixBackwardParams& b, const MixBackwardWorkspace& w, const Device& device,
                                        cudaStream_t stream) {
  return launch_in_order<kDType, OrderedMixedWalks>(b, w, device, stream);
}

}  // namespace flux::cuda::sm90
