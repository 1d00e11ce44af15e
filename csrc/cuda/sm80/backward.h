// The gradients of q, k and v on the tensor cores of every GPU since compute capability 8.0.
//
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta), delta = dO . O per row    (arXiv 2205.14135, section B)
//   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
//
// Two kernels, each with one writer per result and a fixed order of additions, so the same call gives the same bits. In
// the first a block owns kOwned rows of a sequence head (heads of queries, see view_rows) and visits the blocks of keys
// that they see: dQ. In the second it owns kOwned keys and visits the blocks of rows that see any of them: dK and dV,
// summed over the heads of the group. A warp owns 16 of them: what it owns is the left operand of both products, and
// their results, P and dS (or these transposed), are the left operand of the next ones as they stand in its registers.
// Tiles of what is visited come in pairs, keys and values or rows of Q and of dO, through a ring of kStages pairs.
#pragma once

#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"
#include "cuda/plan.h"
#include "cuda/sm80/fragments.h"
#include "cuda/sm80/kernels.h"

namespace flux::cuda::sm80 {

constexpr int kOwned = 64;

// A value in shared memory, where it costs no registers. By all threads of a block.
template <typename Value>
struct Shared {
  __align__(16) unsigned char memory[sizeof(Value)];  // its members have initial values

  template <typename Make>
  __device__ const Value& make(Make make) {
    auto& value = *reinterpret_cast<Value*>(memory);
    if (threadIdx.x == 0) value = make();
    __syncthreads();
    return value;
  }
};

// A block of rows, or of keys, of one sequence.
struct OwnedBlock {
  int32_t seq, block, count;  // count: blocks of the sequence
};

// Number `index` of the blocks of all sequences, of which each has blocks_of(seq). seq = batch: there are less. By
// whole warps.
template <typename BlocksOf>
__device__ OwnedBlock find_block(int32_t batch, int32_t index, BlocksOf blocks_of) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t first = 0; first < batch; first += 32) {
    const int32_t own = first + lane < batch ? blocks_of(first + lane) : 0;
    const int32_t sum = sum_up_to_lane(own);
    const int32_t passed = __popc(__ballot_sync(~0u, sum <= index));
    if (passed < 32)
      return {first + passed, index - __shfl_sync(~0u, sum - own, passed), __shfl_sync(~0u, own, passed)};
    index -= __shfl_sync(~0u, sum, 31);
  }
  return {batch, 0, 0};
}

// Loads the kRows rows of a sequence head from first_row on, of q and of grad_out, by kThreads threads. Zeros stand
// beyond the last row and the head dimension.
template <typename T, int kDim, int kRows, int kThreads>
__device__ void load_rows(const AttendBackwardParams& b, const TileView& seq_head, int32_t first_row,
                          SmemTile<kDim> to_q, SmemTile<kDim> to_grad) {
  using Tile = SmemTile<kDim>;
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
      cp_async16(tile.base + to, static_cast<const T*>(from) + offset, exists ? 16 : 0);
    };
    copy(to_q, p.q.data, p.q.stride);
    copy(to_grad, b.grad_out.data, b.grad_out.stride);
    at.token += step_tokens, at.head += step_heads;
    if (at.head >= end_head) at.head -= group, ++at.token;
  }
}

template <typename T_, int kDim_>
struct Backward {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kVisited = kDim > 128 ? 32 : 64, kStages = kDim > 128 ? 1 : 2;  // 99 KB of tiles at most
  using Tile = SmemTile<kDim>;
  static constexpr int kOwnedBytes = kOwned * Tile::kRowBytes, kVisitedBytes = kVisited * Tile::kRowBytes;
  static constexpr int kTileBytes = 2 * kOwnedBytes + 2 * kStages * kVisitedBytes;

  using Scores = float[1][kVisited / 8][4];  // of 16 that a warp owns, and those that it visits

  static __device__ Tile owned(int i) { return Tile{shared_address(shared_memory()) + i * kOwnedBytes}; }
  static __device__ Tile visited(int stage, int i) {
    return Tile{shared_address(shared_memory()) + 2 * kOwnedBytes + (2 * stage + i) * kVisitedBytes};
  }

  // products[i][j] = owned i . visited j, of a warp's rows and all visited.
  static __device__ void multiply(Scores& products, Tile own, int first_row, Tile visited) {
    multiply_qk<T, 1, kVisited>(products, visited, [&](uint32_t(&a)[4], int, int k) { own.left(a, first_row, 2 * k); });
  }

  // 16 rows, rounded, to a tile in shared memory: those that begin at first_row and chunk.
  template <int kOutTiles>
  static __device__ void store_rows(Tile tile, int first_row, int first_chunk, const float (&out)[1][kOutTiles][4],
                                    float factor) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        const uint32_t pair = pack<T>(out[0][n][2 * half] * factor, out[0][n][2 * half + 1] * factor);
        store_shared(tile.at(first_row + lane / 4 + 8 * half, first_chunk + n) + lane % 4 * 4, pair);
      }
  }
};

// The first kernel: dQ of kOwned rows, and lse and delta of them for the second.
template <typename T, int kDim>
struct QueriesBackward : Backward<T, kDim> {
  using Base = Backward<T, kDim>;
  using Base::kStages, Base::kVisited, Base::owned, Base::visited;
  using typename Base::Scores, typename Base::Tile;
  static constexpr int kThreads = 2 * kOwned, kSmemBytes = Base::kTileBytes, kMinBlocks = kDim > 128 ? 1 : 2;

  static __device__ void run(const AttendBackwardParams& b, const BackwardWorkspace& w, const TileView& seq_head,
                             const Span& rows) {
    const AttendParams& p = b.forward;
    __shared__ Shared<TileView> view;
    const TileView& v = view.make([&] { return view_rows(p, seq_head, rows, kVisited); });
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
    const RowLoader<T, kDim, kVisited, kThreads> load_keys(p, p.kv.k, v, threadIdx.x),
        load_values(p, p.kv.v, v, threadIdx.x);
    const int32_t num_blocks = v.blocks.size();
    const auto load = [&](int32_t i, int stage) {  // always one group
      if (i < num_blocks) {
        load_keys(visited(stage, 0), v.blocks[i] * kVisited);
        load_values(visited(stage, 1), v.blocks[i] * kVisited);
      }
      cp_async_commit();
    };
    load_rows<T, kDim, kOwned, kThreads>(b, seq_head, rows.begin, owned(0), owned(1));
    load(0, 0);  // with the rows

    float lse[2], delta[2];
    VisibleKeys keys[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = rows.begin + first_row + lane / 4 + 8 * half;
      lse[half] = INFINITY, delta[half] = 0.f, keys[half] = {};
      if (row < rows.end) find_row(b, seq_head, v, row, lse[half], delta[half], keys[half]);
      delta[half] += __shfl_xor_sync(~0u, delta[half], 1);
      delta[half] += __shfl_xor_sync(~0u, delta[half], 2);
      if (row < rows.end && lane % 4 == 0) {
        const int64_t at = row_offset(w.row, seq_head, tile_row(p, seq_head, row));
        w.lse[at] = lse[half], w.delta[at] = delta[half];
      }
    }

    const TileMask masked = v.mask();
    const float scale_log2 = p.scale * kLog2e;
    float dq[1][kDim / 8][4] = {};
    for (int32_t i = 0; i < num_blocks; ++i) {
      const int stage = kStages > 1 ? i % kStages : 0;
      if (kStages > 1) load(i + 1, (i + 1) % kStages);
      cp_async_wait<kStages - 1>();
      __syncthreads();
      Scores s, ds;
      Base::multiply(s, owned(0), first_row, visited(stage, 0));
      Base::multiply(ds, owned(1), first_row, visited(stage, 1));
#pragma unroll
      for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float prob = fast_exp2(s[0][n][j] * scale_log2 - lse[j / 2]);
          ds[0][n][j] = prob * (ds[0][n][j] - delta[j / 2]);
        }
      const int32_t kv_begin = v.blocks[i] * kVisited;
      if (masked(kv_begin, kv_begin + kVisited)) {
#pragma unroll
        for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (!keys[j / 2].contain(kv_begin + 8 * n + lane % 4 * 2 + j % 2)) ds[0][n][j] = 0.f;
      }
      multiply_pv<T, 1, kVisited>(dq, ds, visited(stage, 0));
      __syncthreads();  // before the pair is loaded anew
      if (kStages == 1) load(i + 1, 0);
    }
    cp_async_wait<0>();
    __syncthreads();

    Base::store_rows(owned(0), first_row, 0, dq, p.scale);
    __syncwarp();
    for (int index = lane; index < 16 * Tile::kChunks; index += 32) {
      const int row = first_row + index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (rows.begin + row >= rows.end || chunk * 8 >= p.head_dim) continue;
      T* to = static_cast<T*>(b.grad_q.data) +
              row_offset(b.grad_q.stride, seq_head, tile_row(p, seq_head, rows.begin + row)) + chunk * 8;
      *reinterpret_cast<uint4*>(to) = load_shared(owned(0).at(row, chunk));
    }
  }

 private:
  // What one row, and of delta one of its four lanes, has to know.
  static __device__ void find_row(const AttendBackwardParams& b, const TileView& seq_head, const TileView& v,
                                  int32_t row, float& lse, float& delta, VisibleKeys& keys) {
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
};

// The second kernel: dK and dV of kOwned keys. Above head dimension 128 registers do not hold them for 16 keys: two
// warps share the keys, and each has half of the columns.
template <typename T, int kDim>
struct KeysBackward : Backward<T, kDim> {
  using Base = Backward<T, kDim>;
  using Base::kStages, Base::kVisited, Base::owned, Base::visited;
  using typename Base::Scores, typename Base::Tile;
  static constexpr int kParts = kDim > 128 ? 2 : 1, kThreads = 2 * kOwned * kParts;
  static constexpr int kMinBlocks = kDim > 128 ? 1 : 2;

  // Of the rows of a stage.
  struct Rows {
    float lse[kVisited], delta[kVisited];
    VisibleKeys keys[kVisited];
  };
  static constexpr int kSmemBytes = Base::kTileBytes + kStages * int(sizeof(Rows));
  static __device__ Rows& rows_of(int stage) {
    return reinterpret_cast<Rows*>(shared_memory() + Base::kTileBytes)[stage];
  }

  static __device__ ListedBits listed_bits(const AttendParams& p, const BackwardWorkspace& w, const TileView& seq_head,
                                           int32_t kv_begin) {
    if (!seq_head.list.blocks) return {};
    const int32_t index = seq_head.tile.seq * p.kv.num_heads + seq_head.tile.kv_head;
    const int64_t line = int64_t(index) * w.listed_blocks + kv_begin / seq_head.list.width;
    return {w.listed + line * w.listed_words, BlockTable{}.q_width * p.group()};
  }

  static __device__ void run(const AttendBackwardParams& b, const BackwardWorkspace& w, const TileView& seq_head,
                             const Span& keys) {
    const AttendParams& p = b.forward;
    const int32_t group = p.group(), num_rows = seq_head.q_rows.size() * group, kv_len = seq_head.kv_rows.size();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_key = warp % (kOwned / 16) * 16, part = warp / (kOwned / 16);
    __shared__ Shared<QueryBlocks> shared_blocks;
    const QueryBlocks& blocks = shared_blocks.make([&] {
      return query_blocks(seq_head.pattern, keys.begin, keys.end, kv_len, seq_head.q_pos, seq_head.q_rows.size(), group,
                          kVisited, listed_bits(p, w, seq_head, keys.begin));
    });

    // Must any pair of these keys and a block of rows be hidden?
    const auto masked = [&](int32_t m) {
      const int32_t end = min_of((m + 1) * kVisited, num_rows);
      const QueryRange queries{seq_head.pattern, seq_head.list, seq_head.kv_rows, seq_head.q_pos + m * kVisited / group,
                               seq_head.q_pos + ceil_div(end, group)};
      return TileMask(queries)(keys.begin, keys.begin + kOwned);
    };
    const auto load = [&](int32_t m, int stage, bool needs_mask) {  // always one group
      if (m < blocks.end()) {
        load_rows<T, kDim, kVisited, kThreads>(b, seq_head, m * kVisited, visited(stage, 0), visited(stage, 1));
        if (threadIdx.x < kVisited) {
          Rows& rows = rows_of(stage);
          const int i = threadIdx.x;
          const int32_t row = m * kVisited + i;
          if (row < num_rows) {
            const TileRow at = tile_row(p, seq_head, row);
            const int64_t from = row_offset(w.row, seq_head, at);
            cp_async4(shared_address(&rows.lse[i]), w.lse + from);
            cp_async4(shared_address(&rows.delta[i]), w.delta + from);
            if (needs_mask) rows.keys[i] = seq_head.visible_keys(at.token);
          } else {
            rows.lse[i] = INFINITY, rows.delta[i] = 0.f;
            if (needs_mask) rows.keys[i] = {};
          }
        }
      }
      cp_async_commit();
    };

    const RowLoader<T, kDim, kOwned, kThreads> load_keys(p, p.kv.k, seq_head, threadIdx.x),
        load_values(p, p.kv.v, seq_head, threadIdx.x);
    load_keys(owned(0), keys.begin);
    load_values(owned(1), keys.begin);
    int32_t m = blocks.first();
    bool needs_mask = m < blocks.end() && masked(m);
    load(m, 0, needs_mask);  // with the keys

    const float scale_log2 = p.scale * kLog2e;
    float dk[1][kDim / 8 / kParts][4] = {}, dv[1][kDim / 8 / kParts][4] = {};
    const auto columns = [&](Tile tile) { return Tile{tile.base + part * (Tile::kRowBytes / kParts)}; };
    for (int stage = 0; m < blocks.end(); stage = kStages - 1 - stage) {
      const int32_t next = blocks.after(m);
      const bool next_needs_mask = next < blocks.end() && masked(next);
      if (kStages > 1) load(next, kStages - 1 - stage, next_needs_mask);
      cp_async_wait<kStages - 1>();
      __syncthreads();
      const Rows& rows = rows_of(stage);
      const auto hide = [&](Scores& x) {
        const int32_t key = keys.begin + first_key + lane / 4;
#pragma unroll
        for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const VisibleKeys seen = rows.keys[8 * n + lane % 4 * 2 + i];
            if (!seen.contain(key)) x[0][n][i] = 0.f;
            if (!seen.contain(key + 8)) x[0][n][2 + i] = 0.f;
          }
      };
      Scores prob, ds;
      Base::multiply(prob, owned(0), first_key, visited(stage, 0));
#pragma unroll
      for (int n = 0; n < kVisited / 8; ++n) {
        const float2 lse = *reinterpret_cast<const float2*>(&rows.lse[8 * n + lane % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; ++j) prob[0][n][j] = fast_exp2(prob[0][n][j] * scale_log2 - (j % 2 ? lse.y : lse.x));
      }
      if (needs_mask) hide(prob);
      multiply_pv<T, 1, kVisited>(dv, prob, columns(visited(stage, 1)));
      Base::multiply(ds, owned(1), first_key, visited(stage, 1));
#pragma unroll
      for (int n = 0; n < kVisited / 8; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[8 * n + lane % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; ++j) ds[0][n][j] = prob[0][n][j] * (ds[0][n][j] - (j % 2 ? delta.y : delta.x));
      }
      if (needs_mask) hide(ds);
      multiply_pv<T, 1, kVisited>(dk, ds, columns(visited(stage, 0)));
      __syncthreads();  // before the pair is loaded anew
      if (kStages == 1) load(next, 0, next_needs_mask);
      m = next, needs_mask = next_needs_mask;
    }
    cp_async_wait<0>();
    __syncthreads();

    const int first_chunk = part * (Tile::kChunks / kParts);
    Base::store_rows(owned(0), first_key, first_chunk, dk, p.scale);
    Base::store_rows(owned(1), first_key, first_chunk, dv, 1.f);
    __syncthreads();
    for (int index = threadIdx.x; index < kOwned * Tile::kChunks; index += kThreads) {
      const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      if (keys.begin + row >= keys.end || chunk * 8 >= p.head_dim) continue;
      const auto write = [&](const MutableView& to, Tile from) {
        const int64_t at = seq_head.tile.seq * to.stride.b + seq_head.tile.kv_head * to.stride.h +
                           int64_t(seq_head.kv_rows.begin + keys.begin + row) * to.stride.s + chunk * 8;
        *reinterpret_cast<uint4*>(static_cast<T*>(to.data) + at) = load_shared(from.at(row, chunk));
      };
      write(b.grad_k, owned(0));
      write(b.grad_v, owned(1));
    }
  }
};

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    queries_backward_kernel(const __grid_constant__ AttendBackwardParams b, const __grid_constant__ BackwardWorkspace w,
                            const int32_t blocks_per_head) {
  const AttendParams& p = b.forward;
  const int32_t kv_head = blockIdx.x / blocks_per_head, index = blockIdx.x % blocks_per_head;
  const auto num_rows = [&](int32_t seq) { return p.q.rows(seq, kv_head).size() * p.group(); };
  const OwnedBlock own = find_block(p.batch, index, [&](int32_t seq) { return ceil_div(num_rows(seq), kOwned); });
  if (own.seq == p.batch) return;
  const int32_t first = (own.count - 1 - own.block) * kOwned;  // the last rows see the most keys: they come first
  __shared__ Shared<TileView> seq_head;
  Body::run(b, w, seq_head.make([&] { return view_seq_head(p, own.seq, kv_head, Body::kVisited); }),
            {first, min_of(first + kOwned, num_rows(own.seq))});
}

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kMinBlocks)
    keys_backward_kernel(const __grid_constant__ AttendBackwardParams b, const __grid_constant__ BackwardWorkspace w,
                         const int32_t blocks_per_head) {
  const AttendParams& p = b.forward;
  const int32_t kv_head = blockIdx.x / blocks_per_head, index = blockIdx.x % blocks_per_head;
  const auto num_keys = [&](int32_t seq) { return p.kv.rows(seq, kv_head).size(); };
  const OwnedBlock own = find_block(p.batch, index, [&](int32_t seq) { return ceil_div(num_keys(seq), kOwned); });
  if (own.seq == p.batch) return;
  const int32_t first = own.block * kOwned;
  __shared__ Shared<TileView> seq_head;
  Body::run(b, w, seq_head.make([&] { return view_seq_head(p, own.seq, kv_head, Body::kVisited); }),
            {first, min_of(first + kOwned, num_keys(own.seq))});
}

template <typename Body>
cudaError_t launch_backward(void (*kernel)(AttendBackwardParams, BackwardWorkspace, int32_t),
                            const AttendBackwardParams& b, const BackwardWorkspace& w, int64_t blocks_per_head,
                            cudaStream_t stream) {
  const int64_t blocks = blocks_per_head * b.forward.kv.num_heads;
  if (blocks == 0) return cudaSuccess;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes))
    return e;
  return launch(kernel, dim3(unsigned(blocks)), Body::kThreads, Body::kSmemBytes, stream, false, b, w,
                int32_t(blocks_per_head));
}

template <DType kDType, int kDim>
cudaError_t BackwardKernels<kDType, kDim>::launch_queries(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                                          cudaStream_t stream) {
  using Body = QueriesBackward<Element<kDType>, kDim>;
  return launch_backward<Body>(queries_backward_kernel<Body>, b, w, row_blocks(b.forward, kOwned), stream);
}

template <DType kDType, int kDim>
cudaError_t BackwardKernels<kDType, kDim>::launch_keys(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                                       cudaStream_t stream) {
  using Body = KeysBackward<Element<kDType>, kDim>;
  return launch_backward<Body>(keys_backward_kernel<Body>, b, w, key_blocks(b, kOwned), stream);
}

}  // namespace flux::cuda::sm80
