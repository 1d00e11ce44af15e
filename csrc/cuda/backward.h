// What the gradient kernels of both families share: who owns what, how rows come to shared memory, what is known of a
// row.
//
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta), delta = dO . O per row    (arXiv 2205.14135, section B)
//   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
//
// Two kernels, each with one writer per result and a fixed order of additions, so the same call gives the same bits. In
// the first a block owns rows of a sequence head (heads of queries, see view_rows) and visits the blocks of keys that
// they see: dQ. In the second it owns keys and visits the blocks of rows that see any of them: dK and dV, summed over
// the heads of the group. What a block owns is the left operand of both products, and their results, P and dS (or these
// transposed), are the left operand of the next ones as they stand in registers.
#pragma once

#include "cuda/addresses.h"
#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"
#include "cuda/element.h"
#include "cuda/plan.h"
#include "cuda/shared.h"
#include "cuda/sm80/ptx.h"

namespace flux::cuda {

// Are the gradients of a sequence head left to the kernel that adds them up in order (sm90/backward_ordered.h)? A view
// in shared memory tells the compiler that all threads agree; a route in global memory does not, and where they might
// not, WGMMA's descriptors are moved to uniform registers before each product.
__device__ inline bool adds_in_order(const BackwardWorkspace& w, const TileView& seq_head) {
  return w.dq && seq_head.pattern.is_full();
}

// A block of rows, or of keys, of one sequence.
struct OwnedBlock {
  int32_t seq, block, count;  // count: blocks of the sequence; where block is no less, there is no such block
};

// Number `index` of the blocks of all sequences, of which each has blocks_of(seq): the first of each sequence, then the
// second of each, where the launch has as many for every sequence (`in_turn`); else sequence by sequence. By whole
// warps.
//
// What costs most comes first, so that the end is even. Under a causal mask that is keys from first to last (the sink,
// which all queries see, first of all) and rows from last to first.
template <typename BlocksOf>
__device__ OwnedBlock find_block(bool in_turn, int32_t batch, int32_t index, BlocksOf blocks_of) {
  if (in_turn) return {index % batch, index / batch, blocks_of(index % batch)};
  const int32_t lane = threadIdx.x % 32;
  for (int32_t first = 0; first < batch; first += 32) {
    const int32_t own = first + lane < batch ? blocks_of(first + lane) : 0;
    const int32_t sum = sum_up_to_lane(own);
    const int32_t passed = __popc(__ballot_sync(~0u, sum <= index));
    if (passed < 32)
      return {first + passed, index - __shfl_sync(~0u, sum - own, passed), __shfl_sync(~0u, own, passed)};
    index -= __shfl_sync(~0u, sum, 31);
  }
  return {0, 0, 0};
}

// Loads the kRows rows of a sequence head from first_row on, of q and of grad_out, by kThreads threads. Zeros stand
// beyond the last row and the head dimension.
template <typename T, int kRows, int kThreads, typename Tile>
__device__ void load_rows(const AttendBackwardParams& b, const TileView& seq_head, int32_t first_row, Tile to_q,
                          Tile to_grad) {
  constexpr int kDim = 8 * Tile::kChunks;
  constexpr int kColumns = kDim <= 64 ? 8 : kDim <= 128 ? 16 : 32;  // a power of two, so some may be idle
  constexpr int kStep = kThreads / kColumns;                        // rows that load at a time
  static_assert(kRows % kStep == 0);
  const AttendParams& p = b.forward;
  const int32_t group = p.group(), chunk = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  if (kColumns > Tile::kChunks && chunk >= Tile::kChunks) return;
  const int32_t left = chunk * 8 < p.head_dim ? seq_head.q_rows.size() * group - first_row : 0;
  TileRow at = tile_row(p, seq_head, first_row + row);
  const int32_t step_tokens = kStep / group, step_heads = kStep % group, end_head = (seq_head.tile.kv_head + 1) * group;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool exists = row + i * kStep < left;
    const uint32_t to = Tile::offset(row + i * kStep, chunk);
    const auto copy = [&](Tile tile, const void* from, const Strides& stride) {
      const int64_t offset = exists ? row_offset(stride, seq_head, at) + chunk * 8 : 0;
      sm80::cp_async16(tile.base + to, static_cast<const T*>(from) + offset, exists ? 16 : 0);
    };
    copy(to_q, p.q.data, p.q.stride);
    copy(to_grad, b.grad_out.data, b.grad_out.stride);
    at.token += step_tokens, at.head += step_heads;
    if (at.head >= end_head) at.head -= group, ++at.token;
  }
}

// What a block that owns keys knows of the rows it visits, in shared memory.
template <int kRows>
struct alignas(16) VisitedRows {
  float lse[kRows], delta[kRows];
  VisibleKeys keys[kRows];  // where needs_mask
  bool needs_mask;          // must any pair of these rows and the block's keys be hidden?
  bool last;                // are they the last ones that the block visits? (sm90)
};

// What a block that owns rows knows of one of them; of delta a lane has the part of its column out of four.
template <typename T>
struct OwnedRow {
  float lse = INFINITY, delta = 0.f;
  VisibleKeys keys;

  // `v`: the view of the block's rows.
  __device__ OwnedRow(const AttendBackwardParams& b, const TileView& seq_head, const TileView& v, const Span& rows,
                      int32_t row) {
    if (row >= rows.end) return;
    const AttendParams& p = b.forward;
    const TileRow at = tile_row(p, seq_head, row);
    const float natural = lse_at(p, seq_head, at);
    if (natural != -INFINITY) lse = natural * kLog2e;
    keys = v.visible_keys(seq_head.q_rows.begin + at.token - v.q_rows.begin);
    const T* out = out_row<T>(p, seq_head, at);
    const T* grad = static_cast<const T*>(b.grad_out.data) + row_offset(b.grad_out.stride, seq_head, at);
    for (int32_t d = threadIdx.x % 4 * 8; d < p.head_dim; d += 32) {
      const uint4 x = *reinterpret_cast<const uint4*>(out + d), y = *reinterpret_cast<const uint4*>(grad + d);
      const uint32_t xs[] = {x.x, x.y, x.z, x.w}, ys[] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 o = unpack<T>(xs[i]), g = unpack<T>(ys[i]);
        delta += o.x * g.x + o.y * g.y;
      }
    }
  }

  // Makes delta whole, the same in the row's four lanes, and leaves it for the second kernel. By whole warps.
  __device__ void finish(const AttendParams& p, const BackwardWorkspace& w, const TileView& seq_head, const Span& rows,
                         int32_t row) {
    delta += __shfl_xor_sync(~0u, delta, 1);
    delta += __shfl_xor_sync(~0u, delta, 2);
    if (row >= rows.end || threadIdx.x % 4 != 0) return;
    const int64_t at = row_offset(w.row, seq_head, tile_row(p, seq_head, row));
    w.lse[at] = lse, w.delta[at] = delta;
  }
};

// Which query blocks have the keys on their list.
__device__ inline ListedBits lists_with(const AttendParams& p, const BackwardWorkspace& w, const TileView& seq_head,
                                        const Span& keys) {
  ListedBits listed;
  if (seq_head.list.blocks) {
    const int32_t index = seq_head.tile.seq * p.kv.num_heads + seq_head.tile.kv_head;
    const int64_t line = int64_t(index) * w.listed_blocks + keys.begin / seq_head.list.width;
    listed = {w.listed + line * w.listed_words, BlockTable{}.q_width * p.group()};
  }
  return listed;
}

// The blocks of `block` rows that see any of the keys.
__device__ inline QueryBlocks blocks_seeing(const AttendParams& p, const BackwardWorkspace& w, const TileView& seq_head,
                                            const Span& keys, int32_t block) {
  return query_blocks(seq_head.pattern, keys.begin, keys.end, seq_head.kv_rows.size(), seq_head.q_pos,
                      seq_head.q_rows.size(), p.group(), block, lists_with(p, w, seq_head, keys));
}

// A Body has kOwned, kVisited, kThreads, kSmemBytes, kMinBlocks, kLeavesFull (may heads be left to another kernel, see
// adds_in_order?), and runs one block.
template <typename Body, typename Params, typename Workspace>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    queries_backward_kernel(const __grid_constant__ Params b, const __grid_constant__ Workspace w, const bool in_turn) {
  const AttendParams& p = b.forward;
  const int32_t kv_head = blockIdx.x % p.kv.num_heads, index = blockIdx.x / p.kv.num_heads;
  const auto num_rows = [&](int32_t seq) { return p.q.rows(seq, kv_head).size() * p.group(); };
  const OwnedBlock own =
      find_block(in_turn, p.batch, index, [&](int32_t seq) { return ceil_div(num_rows(seq), Body::kOwned); });
  if (own.block >= own.count) return;
  __shared__ Shared<TileView> shared_view;
  const TileView& v = shared_view.make([&] { return view_seq_head(p, own.seq, kv_head, Body::kVisited); });
  if constexpr (Body::kLeavesFull)
    if (adds_in_order(w, v)) return;
  const int32_t first = (own.count - 1 - own.block) * Body::kOwned;
  Body::run(b, w, v, {first, min_of(first + Body::kOwned, num_rows(own.seq))});
}

template <typename Body, typename Params, typename Workspace>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    keys_backward_kernel(const __grid_constant__ Params b, const __grid_constant__ Workspace w, const bool in_turn) {
  const AttendParams& p = b.forward;
  const int32_t kv_head = blockIdx.x % p.kv.num_heads, index = blockIdx.x / p.kv.num_heads;
  const auto num_keys = [&](int32_t seq) { return p.kv.rows(seq, kv_head).size(); };
  const OwnedBlock own =
      find_block(in_turn, p.batch, index, [&](int32_t seq) { return ceil_div(num_keys(seq), Body::kOwned); });
  if (own.block >= own.count) return;
  __shared__ Shared<TileView> shared_view;
  const TileView& v = shared_view.make([&] { return view_seq_head(p, own.seq, kv_head, Body::kVisited); });
  if constexpr (Body::kLeavesFull)
    if (adds_in_order(w, v)) return;
  const int32_t first = own.block * Body::kOwned;
  Body::run(b, w, v, {first, min_of(first + Body::kOwned, num_keys(own.seq))});
}

template <typename Body, typename Params, typename Workspace>
cudaError_t launch_backward(void (*kernel)(Params, Workspace, bool), const Params& b, const Workspace& w,
                            const BlockCount& count, cudaStream_t stream) {
  const int64_t blocks = count.most() * b.forward.kv.num_heads;
  if (blocks == 0) return cudaSuccess;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes))
    return e;
  return launch(kernel, dim3(unsigned(blocks)), Body::kThreads, Body::kSmemBytes, stream, false, b, w,
                count.padded <= count.packed);
}
template <typename Body, typename Params, typename Workspace>
cudaError_t launch_queries_backward(const Params& b, const Workspace& w, cudaStream_t stream) {
  return launch_backward<Body>(queries_backward_kernel<Body, Params, Workspace>, b, w,
                               count_row_blocks(b.forward, Body::kOwned), stream);
}
template <typename Body, typename Params, typename Workspace>
cudaError_t launch_keys_backward(const Params& b, const Workspace& w, cudaStream_t stream) {
  return launch_backward<Body>(keys_backward_kernel<Body, Params, Workspace>, b, w, count_key_blocks(b, Body::kOwned),
                               stream);
}

}  // namespace flux::cuda
