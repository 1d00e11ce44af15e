// The order of a mixture's tiles; and its gradients: those of plain attention (backward.h), with the keys of each part
// by numbers of its own.
//
// Within a part the branches differ by factors of the row alone (SetGradient, core/mixture.h): the keys of the sparse
// part are seen by both branches, those of the rest by the full one alone. The share moves into the log-sum-exp.
#pragma once

#include "cuda/backward_walk.h"
#include "cuda/mix.h"

namespace flux::cuda {

// Number `item` of a launch's tiles, longest first; q_block < 0: there is no such tile. By whole warps.
__device__ inline Tile find_tile(const AttendParams& p, const MixTiles& tiles, uint32_t item) {
  const uint32_t heads = tiles.num_kv_heads, each = tiles.each;
  const auto kv_head = int32_t(tiles.heads_in_turn ? item % heads : item / each);
  const auto index = int32_t(tiles.heads_in_turn ? item / heads : item % each);
  const OwnedBlock own = find_block(tiles.sequences_in_turn, p.batch, index,
                                    [&](int32_t seq) { return tiles_in_seq_head(p, tiles.shape, seq, kv_head); });
  return {own.seq, kv_head, own.count - 1 - own.block};
}

// All heads of a mixture have the same kernels: none is left to others.
__device__ inline bool adds_in_order(const MixBackwardWorkspace&, const TileView&) { return false; }

// share exp2(score - lse) = exp2(score - shared_lse)
FLUX_HD float shared_lse(const SetGradient& g) { return g.share == 0.f ? INFINITY : g.lse - log2f(g.share); }

// What a block that owns rows knows of one of them. Until it is finished that is both branches' log-sum-exps (times
// log2(e)), and of the sums a lane has the part of its columns.
template <typename T>
struct MixedRow {
  float weight = 0.f, of_weight = 0.f;
  float lse = -INFINITY, delta = 0.f;            // of the sparse part; first of the sparse branch
  float rest_lse = -INFINITY, rest_delta = 0.f;  // of the rest; first of the full branch
  VisibleKeys keys;                              // of the sparse part

  __device__ MixedRow(const MixBackwardParams& b, const TileView& seq_head, const TileView& v, const Span& rows,
                      int32_t row) {
    if (row >= rows.end) return;
    const AttendParams& p = b.forward;
    const Mixture& m = b.mixture;
    const TileRow at = tile_row(p, seq_head, row);
    weight = m.weight_of(seq_head.tile.seq, seq_head.tile.kv_head);
    lse = m.sparse_lse[row_offset(p.lse_stride, seq_head, at)] * kLog2e;
    rest_lse = lse_at(p, seq_head, at) * kLog2e;
    keys = v.visible_keys(seq_head.q_rows.begin + at.token - v.q_rows.begin);
    const auto row_of = [&](const auto& view) {
      return static_cast<const T*>(view.data) + row_offset(view.stride, seq_head, at);
    };
    const T *full = row_of(p.out), *sparse = row_of(m.sparse_out), *grad = row_of(b.grad_out);
    for (int32_t d = threadIdx.x % 4 * 8; d < p.head_dim; d += 32) {
      const auto load = [&](const T* from) { return *reinterpret_cast<const uint4*>(from + d); };
      const uint4 x = load(full), y = load(sparse), z = load(grad);
      const uint32_t xs[] = {x.x, x.y, x.z, x.w}, ys[] = {y.x, y.y, y.z, y.w}, zs[] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = unpack<T>(xs[i]), s = unpack<T>(ys[i]), g = unpack<T>(zs[i]);
        rest_delta += f.x * g.x + f.y * g.y;
        delta += s.x * g.x + s.y * g.y;
        of_weight += (s.x - f.x) * g.x + (s.y - f.y) * g.y;
      }
    }
  }

  // Makes the sums whole, the same in the row's four lanes, and of the branches the parts, and leaves what the kernels
  // that follow need. By whole warps.
  __device__ void finish(const AttendParams& p, const MixBackwardWorkspace& w, const TileView& seq_head,
                         const Span& rows, int32_t row) {
    const auto whole = [](float sum) {
      sum += __shfl_xor_sync(~0u, sum, 1);
      return sum + __shfl_xor_sync(~0u, sum, 2);
    };
    delta = whole(delta), rest_delta = whole(rest_delta), of_weight = whole(of_weight);
    const SetGradient both = seen_by_both(1.f - weight, rest_lse, rest_delta, weight, lse, delta);
    rest_lse = shared_lse(seen_by_one(1.f - weight, rest_lse, rest_delta));
    lse = shared_lse(both), delta = both.delta;
    if (row >= rows.end || threadIdx.x % 4 != 0) return;
    const BackwardWorkspace &sparse = w.parts[kSparsePart], &rest = w.parts[kRestPart];
    const int64_t at = row_offset(sparse.row, seq_head, tile_row(p, seq_head, row));
    sparse.lse[at] = lse, sparse.delta[at] = delta;
    rest.lse[at] = rest_lse, rest.delta[at] = rest_delta;
    w.of_weight[at] = of_weight;
  }
};

// See HardWalks (backward_walk.h).
struct MixedWalks {
  using Params = MixBackwardParams;
  using Workspace = MixBackwardWorkspace;

  // The blocks of keys of the sparse part, then those of the rest.
  template <typename T>
  struct OfRows {
    using Row = MixedRow<T>;
    struct Place {
      Part part;
    };
    PartView parts[kParts];
    PartMask masks[kParts];

    __device__ OfRows(const TileView& rows, int32_t kv_block)
        : parts{{rows, kSparsePart, kv_block}, {rows, kRestPart, kv_block}}, masks{parts[0].mask(), parts[1].mask()} {}
    __device__ const TileView& view() const { return parts[kSparsePart]; }
    __device__ int32_t rest_begins() const { return parts[kSparsePart].blocks.size(); }
    __device__ int32_t size() const { return rest_begins() + parts[kRestPart].blocks.size(); }
    __device__ int32_t operator[](int32_t i) const {
      const int32_t rest = i - rest_begins();
      return rest >= 0 ? parts[kRestPart].blocks[rest] : parts[kSparsePart].blocks[i];
    }
    __device__ Place place(int32_t i) const { return {i < rest_begins() ? kSparsePart : kRestPart}; }
    __device__ int mask() const { return 0; }  // nothing to keep in registers
    __device__ bool needs_mask(int, Place at, int32_t kv_begin, int32_t kv_end) const {
      return masks[at.part](kv_begin, kv_end);
    }
    __device__ float lse(const Row& row, Place at) const { return at.part == kRestPart ? row.rest_lse : row.lse; }
    __device__ float delta(const Row& row, Place at) const { return at.part == kRestPart ? row.rest_delta : row.delta; }
    __device__ VisibleKeys keys(const Row& row, Place at) const {
      return at.part == kRestPart ? rest_of(row.keys, parts[kRestPart].list) : row.keys;
    }
    __device__ VisibleKeys visible_keys(int32_t token, Place at) const { return parts[at.part].visible_keys(token); }
  };

  // The blocks of rows that see the keys in the sparse part, then those in the rest.
  struct OfKeys {
    QueryBlocks sparse, rest;
    RowsSeeingAll see_all[kParts];

    __device__ OfKeys(const AttendParams& p, const MixBackwardWorkspace& w, const TileView& seq_head, const Span& keys,
                      int32_t block)
        : sparse(blocks_seeing(p, w.parts[kSparsePart], seq_head, keys, block)),
          rest(rest_query_blocks(seq_head.pattern, keys.begin, keys.end, seq_head.kv_rows.size(), seq_head.q_pos,
                                 seq_head.q_rows.size(), p.group(), block,
                                 lists_with(p, w.parts[kRestPart], seq_head, keys))),
          see_all{rows_seeing_all(p, seq_head, kSparsePart, keys), rows_seeing_all(p, seq_head, kRestPart, keys)} {}
    __device__ int32_t first() const { return sparse_or_rest(sparse.first()); }
    __device__ int32_t after(int32_t i) const {
      return i < sparse.end() ? sparse_or_rest(sparse.after(i)) : sparse.end() + rest.after(i - sparse.end());
    }
    __device__ int32_t end() const { return sparse.end() + rest.end(); }
    __device__ int32_t operator[](int32_t i) const { return i < sparse.end() ? i : i - sparse.end(); }
    __device__ const BackwardWorkspace& numbers(const MixBackwardWorkspace& w, int32_t i) const {
      return w.parts[part(i)];
    }
    __device__ VisibleKeys visible_keys(const TileView& seq_head, int32_t token, int32_t i) const {
      const VisibleKeys sparse_part = seq_head.visible_keys(token);
      return part(i) == kSparsePart ? sparse_part : rest_of(sparse_part, seq_head.list);
    }
    __device__ bool needs_mask(const AttendParams&, const TileView&, const Span&, int32_t i, int32_t first,
                               int32_t end) const {
      return !see_all[part(i)].contain(first, end);
    }
    __device__ bool needs_mask_of_queries(const TileView&, const Span&, int32_t i, const Span&, int32_t rows) const {
      return !see_all[part(i)].contain((*this)[i] * rows, ((*this)[i] + 1) * rows);
    }

   private:
    __device__ Part part(int32_t i) const { return i < sparse.end() ? kSparsePart : kRestPart; }
    __device__ int32_t sparse_or_rest(int32_t i) const { return i < sparse.end() ? i : sparse.end() + rest.first(); }
    static __device__ RowsSeeingAll rows_seeing_all(const AttendParams& p, const TileView& seq_head, Part part,
                                                    const Span& keys) {
      return {queries_seeing_all(seq_head.pattern, seq_head.list.blocks, part, keys.begin, keys.end,
                                 seq_head.kv_rows.size()),
              seq_head.q_pos, seq_head.q_rows.size(), p.group()};
    }
  };
};

}  // namespace flux::cuda
