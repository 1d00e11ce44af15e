// The gradients on the tensor cores of every GPU since compute capability 8.0; see cuda/backward.h.
//
// A warp owns 16 of the block's rows or keys. Tiles of what is visited come in pairs, keys and values or rows of Q and
// of dO, through a ring of kStages pairs. What is visited, and with which numbers per row, a Walk says
// (backward_walk.h).
#pragma once

#include "cuda/backward_walk.h"
#include "cuda/sm80/fragments.h"
#include "cuda/sm80/kernels.h"

namespace flux::cuda::sm80 {

template <typename T_, int kDim_>
struct Backward {
  using T = T_;
  static constexpr int kDim = kDim_, kOwned = 64;                                      // rows or keys of a block
  static constexpr int kVisited = kDim > 128 ? 32 : 64, kStages = kDim > 128 ? 1 : 2;  // 99 KB of tiles at most
  using Tile = SmemTile<kDim>;
  static constexpr int kOwnedBytes = kOwned * Tile::kRowBytes, kVisitedBytes = kVisited * Tile::kRowBytes;
  static constexpr int kTileBytes = 2 * kOwnedBytes + 2 * kStages * kVisitedBytes;
  static constexpr bool kLeavesFull = false;

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
template <typename T, int kDim, typename Walks>
struct QueriesBackward : Backward<T, kDim> {
  using Base = Backward<T, kDim>;
  using Base::kOwned, Base::kStages, Base::kVisited, Base::owned, Base::visited;
  using typename Base::Scores, typename Base::Tile;
  static constexpr int kThreads = 2 * kOwned, kSmemBytes = Base::kTileBytes, kMinBlocks = kDim > 128 ? 1 : 2;

  using Walk = typename Walks::template OfRows<T>;
  using Row = typename Walk::Row;

  static __device__ void run(const typename Walks::Params& b, const typename Walks::Workspace& w,
                             const TileView& seq_head, const Span& rows) {
    const AttendParams& p = b.forward;
    __shared__ Shared<Walk> shared_walk;
    const Walk& walk = shared_walk.make([&] { return Walk(view_rows(p, seq_head, rows, kVisited), kVisited); });
    const TileView& v = walk.view();
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
    const RowLoader<T, kDim, kVisited, kThreads> load_keys(p, p.kv.k, v, threadIdx.x),
        load_values(p, p.kv.v, v, threadIdx.x);
    const int32_t num_blocks = walk.size();
    const auto load = [&](int32_t i, int stage) {  // always one group
      if (i < num_blocks) {
        load_keys(visited(stage, 0), walk[i] * kVisited);
        load_values(visited(stage, 1), walk[i] * kVisited);
      }
      cp_async_commit();
    };
    load_rows<T, kOwned, kThreads>(b, seq_head, rows.begin, owned(0), owned(1));
    load(0, 0);  // with the rows

    const int32_t own_row = rows.begin + first_row + lane / 4;
    Row own[] = {{b, seq_head, v, rows, own_row}, {b, seq_head, v, rows, own_row + 8}};
    own[0].finish(p, w, seq_head, rows, own_row), own[1].finish(p, w, seq_head, rows, own_row + 8);

    const auto masked = walk.mask();
    const float scale_log2 = p.scale * kLog2e;
    float dq[1][kDim / 8][4] = {};
    for (int32_t i = 0; i < num_blocks; ++i) {
      const int stage = kStages > 1 ? i % kStages : 0;
      if (kStages > 1) load(i + 1, (i + 1) % kStages);
      cp_async_wait<kStages - 1>();
      __syncthreads();
      const auto place = walk.place(i);
      Scores s, ds;
      Base::multiply(s, owned(0), first_row, visited(stage, 0));
      Base::multiply(ds, owned(1), first_row, visited(stage, 1));
#pragma unroll
      for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float prob = fast_exp2(s[0][n][j] * scale_log2 - walk.lse(own[j / 2], place));
          ds[0][n][j] = prob * (ds[0][n][j] - walk.delta(own[j / 2], place));
        }
      const int32_t kv_begin = walk[i] * kVisited;
      if (walk.needs_mask(masked, place, kv_begin, kv_begin + kVisited)) {
        const VisibleKeys keys[] = {walk.keys(own[0], place), walk.keys(own[1], place)};
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
};

// The second kernel: dK and dV of kOwned keys. Above head dimension 128 registers do not hold them for 16 keys: two
// warps share the keys, and each has half of the columns.
template <typename T, int kDim, typename Walks>
struct KeysBackward : Backward<T, kDim> {
  using Base = Backward<T, kDim>;
  using Base::kOwned, Base::kStages, Base::kVisited, Base::owned, Base::visited;
  using typename Base::Scores, typename Base::Tile;
  static constexpr int kParts = kDim > 128 ? 2 : 1, kThreads = 2 * kOwned * kParts;
  static constexpr int kMinBlocks = kDim > 128 ? 1 : 2;

  using Walk = typename Walks::OfKeys;
  using Rows = VisitedRows<kVisited>;
  static constexpr int kSmemBytes = Base::kTileBytes + kStages * int(sizeof(Rows));
  static_assert(kSmemBytes + int(sizeof(Shared<TileView>) + sizeof(Shared<Walk>)) <= 99 * 1024);
  static __device__ Rows& rows_of(int stage) {
    return reinterpret_cast<Rows*>(shared_memory() + Base::kTileBytes)[stage];
  }

  static __device__ void run(const typename Walks::Params& b, const typename Walks::Workspace& w,
                             const TileView& seq_head, const Span& keys) {
    const AttendParams& p = b.forward;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_key = warp % (kOwned / 16) * 16, part = warp / (kOwned / 16);
    __shared__ Shared<Walk> shared_walk;
    const Walk& walk = shared_walk.make([&] { return Walk(p, w, seq_head, keys, kVisited); });
    const auto load = [&](int32_t i, int stage) {  // always one group
      if (i < walk.end()) {
        load_rows<T, kVisited, kThreads>(b, seq_head, walk[i] * kVisited, visited(stage, 0), visited(stage, 1));
        load_visited_rows(b, w, seq_head, walk, {keys.begin, keys.begin + kOwned}, i, rows_of(stage));
      }
      cp_async_commit();
    };

    const RowLoader<T, kDim, kOwned, kThreads> load_keys(p, p.kv.k, seq_head, threadIdx.x),
        load_values(p, p.kv.v, seq_head, threadIdx.x);
    load_keys(owned(0), keys.begin);
    load_values(owned(1), keys.begin);
    int32_t i = walk.first();
    load(i, 0);  // with the keys

    const float scale_log2 = p.scale * kLog2e;
    float dk[1][kDim / 8 / kParts][4] = {}, dv[1][kDim / 8 / kParts][4] = {};
    const auto columns = [&](Tile tile) { return Tile{tile.base + part * (Tile::kRowBytes / kParts)}; };
    for (int stage = 0; i < walk.end(); stage = kStages - 1 - stage) {
      const int32_t next = walk.after(i);
      if (kStages > 1) load(next, kStages - 1 - stage);
      cp_async_wait<kStages - 1>();
      __syncthreads();
      const Rows& rows = rows_of(stage);
      const auto hide = [&](Scores& x) {
        const int32_t key = keys.begin + first_key + lane / 4;
#pragma unroll
        for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const VisibleKeys seen = rows.keys[8 * n + lane % 4 * 2 + j];
            if (!seen.contain(key)) x[0][n][j] = 0.f;
            if (!seen.contain(key + 8)) x[0][n][2 + j] = 0.f;
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
      if (rows.needs_mask) hide(prob);
      multiply_pv<T, 1, kVisited>(dv, prob, columns(visited(stage, 1)));
      Base::multiply(ds, owned(1), first_key, visited(stage, 1));
#pragma unroll
      for (int n = 0; n < kVisited / 8; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(&rows.delta[8 * n + lane % 4 * 2]);
#pragma unroll
        for (int j = 0; j < 4; ++j) ds[0][n][j] = prob[0][n][j] * (ds[0][n][j] - (j % 2 ? delta.y : delta.x));
      }
      if (rows.needs_mask) hide(ds);
      multiply_pv<T, 1, kVisited>(dk, ds, columns(visited(stage, 0)));
      __syncthreads();  // before the pair is loaded anew
      if (kStages == 1) load(next, 0);
      i = next;
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

template <DType kDType, int kDim>
cudaError_t BackwardKernels<kDType, kDim>::launch_queries(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                                          cudaStream_t stream) {
  return launch_queries_backward<QueriesBackward<Element<kDType>, kDim, HardWalks>>(b, w, stream);
}

template <DType kDType, int kDim>
cudaError_t BackwardKernels<kDType, kDim>::launch_keys(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                                       cudaStream_t stream) {
  return launch_keys_backward<KeysBackward<Element<kDType>, kDim, HardWalks>>(b, w, stream);
}

}  // namespace flux::cuda::sm80
