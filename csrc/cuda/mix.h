// Mixtures on CUDA in one walk over the keys (core/mixture_parts.h): launchers, and what their kernels share. As in
// cuda.h, nothing here synchronises with the host.
//
// For a mixture whose full pattern shows every key. The routing of all parameters here is by its sparse pattern alone
// (sparse_alone); `out` and `lse` are those of the full branch.
#pragma once

#include "core/mixture_parts.h"
#include "cuda/cuda.h"

namespace flux::cuda {

// The tiles of a launch: whole ones, of every KV head as many; for the place of a number among them see `find_tile`
// (mix_backward.h).
struct MixTiles {
  TileShape shape;
  int64_t each;  // of a KV head at most
  int32_t num_kv_heads;
  bool sequences_in_turn;  // see find_block, backward.h
  bool heads_in_turn;      // the first tile of each, then the second; else one KV head after the other

  MixTiles(const AttendParams& p, int32_t tile_rows, int32_t kv_block)
      : shape{q_tokens_of(p, tile_rows), kv_block}, num_kv_heads(p.kv.num_heads) {
    const BlockCount count{int64_t(p.batch) * ceil_div(p.q.max_len, shape.q_tokens),
                           p.q.total_rows / shape.q_tokens + p.batch};
    each = count.most();
    sequences_in_turn = count.padded <= count.packed;
    heads_in_turn = takes_turns(num_seq_heads(p), p.kv.rows.capacity, p.head_dim);
  }
  FLUX_HD int64_t total() const { return each * num_kv_heads; }
};

struct MixBackwardParams : AttendBackwardParams {
  Mixture mixture;
};

// Of each part what plain attention has of all; see BackwardWorkspace.
struct MixBackwardWorkspace {
  BackwardWorkspace parts[kParts];
  float* of_weight = nullptr;  // grad_out . (sparse - full) of each row, in their order
  size_t bytes = 0;
};
// `in_order`: see can_add_in_order.
inline MixBackwardWorkspace lay_out(const MixBackwardParams& b, bool in_order, void* base) {
  const AttendParams& p = b.forward;
  MixBackwardWorkspace w;
  BackwardWorkspace &sparse = w.parts[kSparsePart], &rest = w.parts[kRestPart];
  sparse = rest = lay_out(static_cast<const AttendBackwardParams&>(b), in_order, base);
  w.bytes = sparse.bytes;
  const auto take = taking_from(base, w.bytes);
  const int64_t rows = (p.lse_stride.b ? p.batch : 1) * int64_t(p.q.num_heads) * p.q.rows.capacity;
  take(rest.lse, rows);
  take(rest.delta, rows);
  take(w.of_weight, rows);
  if (sparse.listed) take(rest.listed, int64_t(num_seq_heads(p)) * sparse.listed_blocks * sparse.listed_words);
  return w;
}

// `memory` is kMixBytes of device memory, for the counter of tiles.
constexpr size_t kMixBytes = 256;
Status mix(const AttendParams& p, const Mixture& m, void* memory, cudaStream_t stream);
// `memory` is 256-byte aligned device memory of lay_out(b, can_add_in_order(b), nullptr).bytes. Rows that belong to no
// sequence are not written; of the weight every entry is.
Status mix_backward(const MixBackwardParams& b, void* memory, cudaStream_t stream);

// The family of kernels for Hopper: does it take a mixture? `counter` is in device memory.
namespace sm90 {
bool mixes(const AttendParams& p);
cudaError_t mix(const AttendParams& p, const Mixture& m, int32_t* counter, const Device& device, cudaStream_t stream);
}  // namespace sm90

}  // namespace flux::cuda
