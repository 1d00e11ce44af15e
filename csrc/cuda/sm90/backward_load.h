// How tiles and what is known of rows come to the gradient kernels' shared memory: by cp.async, which reads rows of any
// layout and group, into the layout that TMA would write (Traits, traits.h). For a warpgroup that does nothing else.
//
// The loads of a block must not take longer than its products, so addresses go from one to the next by adding wherever
// a number of rows is a whole number of queries; a division takes as long as many loads.
#pragma once

#include "cuda/backward_walk.h"
#include "cuda/sm90/traits.h"

namespace flux::cuda::sm90 {

constexpr int kLoadThreads = 128;

// A tile in shared memory as slabs of kSlab columns, rows of 128 (or 64) bytes, swizzled; kThreads load it.
template <int kDim, int kRows, int kThreads_ = kLoadThreads>
struct SlabTile {
  static constexpr int kThreads = kThreads_;
  static constexpr int kChunks = kDim / 8, kSlabChunks = kDim % 64 == 0 ? 8 : 4;  // of 16 bytes
  uint32_t base;

  static CUTLASS_DEVICE uint32_t offset(int row, int chunk) {
    const int phase = kSlabChunks == 8 ? row & 7 : (row >> 1) & 3;
    return 16 * ((chunk / kSlabChunks * kRows + row) * kSlabChunks + (chunk % kSlabChunks ^ phase));
  }
};

// What a thread copies of a tile: 16 bytes, `chunk` and those kColumns apart, of row `row` and those kStep apart.
template <typename Tile>
struct LoadingThread {
  static constexpr int kColumns = Tile::kChunks <= 8 || Tile::kThreads < 128 ? 8 : 16,
                       kStep = Tile::kThreads / kColumns;
  static constexpr int kChunksEach = ceil_div(Tile::kChunks, kColumns);
  int32_t chunk = threadIdx.x % kColumns, row = threadIdx.x / kColumns;

  CUTLASS_DEVICE bool idle() const { return chunk >= Tile::kChunks; }

  // `left`: rows of the tile from `row` on that exist; zeros stand for the others, and for columns past the head
  // dimension. `step()`: from a row to the next one that this thread copies.
  template <int kRows, typename T, typename Step>
  CUTLASS_DEVICE void copy(Tile tile, const T* from, Step step, int32_t left, int32_t head_dim, const void* any) const {
    static_assert(kStep % 8 == 0);  // so rows a step apart are swizzled alike
    const uint32_t to = tile.base + Tile::offset(row, chunk);
    if (chunk * 8 >= head_dim) left = 0;
    CUTE_UNROLL
    for (int i = 0; i < kRows / kStep; ++i) {
      CUTE_UNROLL
      for (int c = 0; c < kChunksEach; ++c) {
        const bool exists = i * kStep < left && (c == 0 || (chunk + c * kColumns) * 8 < head_dim);
        sm80::cp_async16(to + Tile::offset(i * kStep, c * kColumns), exists ? from + c * kColumns * 8 : any,
                         exists ? 16 : 0);
      }
      from += step();
    }
  }
};

// Blocks of keys or values.
template <typename T, typename Tile>
class KeyLoader {
 public:
  CUTLASS_DEVICE KeyLoader(const AttendParams& p, const View& global, const TileView& seq_head)
      : p_(p), global_(global), keys_(seq_head.kv_rows.size()) {
    const Strides& s = global.stride;
    from_ = seq_head.tile.seq * s.b + seq_head.tile.kv_head * s.h + (seq_head.kv_rows.begin + thread_.row) * s.s +
            thread_.chunk * 8;
  }

  // The kRows keys from `begin` on.
  template <int kRows>
  CUTLASS_DEVICE void load(int32_t begin, Tile tile) const {
    if (thread_.idle()) return;
    const int64_t stride = global_.stride.s;
    const int64_t step = LoadingThread<Tile>::kStep * stride;
    thread_.template copy<kRows>(
        tile, static_cast<const T*>(global_.data) + from_ + begin * stride, [&] { return step; },
        keys_ - begin - thread_.row, p_.head_dim, global_.data);
  }

 private:
  const AttendParams& p_;
  const View& global_;
  const LoadingThread<Tile> thread_;
  const int32_t keys_;
  int64_t from_;
};

// Blocks of kRows rows of Q and of dO. Where a step of the threads is a whole number of queries, addresses of all
// blocks follow from the first; else (kAnyGroup) a block begins with a division.
template <typename T, int kRows, typename Tile, bool kAnyGroup = true>
class RowLoader {
 public:
  CUTLASS_DEVICE RowLoader(const AttendBackwardParams& b, const TileView& seq_head) : b_(b), seq_head_(seq_head) {
    const int32_t group = b.forward.group();
    if (!kAnyGroup || Thread::kStep % group == 0) tokens_ = Thread::kStep / group;
    const TileRow at = tile_row(b.forward, seq_head, thread_.row);
    q_ = row_offset(b.forward.q.stride, seq_head, at) + thread_.chunk * 8;
    grad_ = row_offset(b.grad_out.stride, seq_head, at) + thread_.chunk * 8;
  }

  CUTLASS_DEVICE void load(int32_t block, Tile to_q, Tile to_grad) const {
    if (thread_.idle()) return;
    const AttendParams& p = b_.forward;
    const int32_t group = p.group(), left = seq_head_.q_rows.size() * group - block * kRows - thread_.row;
    const auto copy = [&](Tile tile, const void* data, const T* from, auto step) {
      thread_.template copy<kRows>(tile, from, step, left, p.head_dim, data);
    };
    if (!kAnyGroup || tokens_ > 0) {
      const auto copy_whole = [&](Tile tile, const void* data, int64_t offset, const Strides& stride) {
        const int64_t step = tokens_ * stride.s;
        copy(tile, data, static_cast<const T*>(data) + offset + block * (kRows / Thread::kStep) * step,
             [&] { return step; });
      };
      copy_whole(to_q, p.q.data, q_, p.q.stride);
      copy_whole(to_grad, b_.grad_out.data, grad_, b_.grad_out.stride);
      return;
    }
    const TileRow at = tile_row(p, seq_head_, block * kRows + thread_.row);
    const int32_t heads = Thread::kStep % group;
    const auto copy_cut = [&](Tile tile, const void* data, const Strides& stride) {
      const int64_t step = Thread::kStep / group * stride.s + heads * stride.h,
                    next_query = stride.s - group * stride.h;
      int32_t head = at.head - seq_head_.tile.kv_head * group;
      copy(tile, data, static_cast<const T*>(data) + row_offset(stride, seq_head_, at) + thread_.chunk * 8, [&] {
        head += heads;
        if (head < group) return step;
        head -= group;
        return step + next_query;
      });
    };
    copy_cut(to_q, p.q.data, p.q.stride);
    copy_cut(to_grad, b_.grad_out.data, b_.grad_out.stride);
  }

 private:
  using Thread = LoadingThread<Tile>;
  const AttendBackwardParams& b_;
  const TileView& seq_head_;
  const Thread thread_;
  int32_t tokens_ = 0;  // of a step, where that is a whole number
  int64_t q_, grad_;    // of this thread's first row
};

// What is known of the blocks of kRows rows that a walk comes to; see load_visited_rows. kAny: also where they are no
// whole number of queries.
template <class Walks, int kRows, bool kAny = true>
class RowFactsLoader {
 public:
  using Params = typename Walks::Params;
  using Workspace = typename Walks::Workspace;
  using Walk = typename Walks::OfKeys;

  CUTLASS_DEVICE RowFactsLoader(const Params& b, const Workspace& w, const TileView& seq_head, const Walk& walk,
                                const Span& owned_keys)
      : b_(b), w_(w), seq_head_(seq_head), walk_(walk), keys_(owned_keys) {
    const int32_t group = b.forward.group();
    if (kAny && kRows % group != 0) return;
    tokens_ = kRows / group;
    const TileRow at = tile_row(b.forward, seq_head, int32_t(threadIdx.x));
    token_ = at.token;
    from_ = row_offset(walk.numbers(w, 0).row, seq_head, at);
  }

  CUTLASS_DEVICE void load(int32_t at, VisitedRows<kRows>& rows) const {
    if (kAny && tokens_ == 0) return load_visited_rows(b_, w_, seq_head_, walk_, keys_, at, rows);
    const int32_t i = threadIdx.x, first = walk_[at] * tokens_, token = first + token_;
    if (i >= kRows) return;
    const BackwardWorkspace& w = walk_.numbers(w_, at);
    const bool needs_mask = walk_.needs_mask_of_queries(seq_head_, keys_, at, {first, first + tokens_}, kRows);
    const bool exists = token < seq_head_.q_rows.size();
    if (i == 0) rows.needs_mask = needs_mask;
    if (exists) {
      const int64_t from = from_ + first * w.row.s;
      sm80::cp_async4(sm80::shared_address(&rows.lse[i]), w.lse + from);
      sm80::cp_async4(sm80::shared_address(&rows.delta[i]), w.delta + from);
    } else {
      rows.lse[i] = INFINITY, rows.delta[i] = 0.f;
    }
    if (needs_mask) rows.keys[i] = exists ? walk_.visible_keys(seq_head_, token, at) : VisibleKeys{};
  }

 private:
  const Params& b_;
  const Workspace& w_;
  const TileView& seq_head_;
  const Walk& walk_;
  const Span keys_;
  int32_t tokens_ = 0, token_ = 0;  // of a block, or 0: each is found anew; of this thread's row, in the first block
  int64_t from_ = 0;
};

}  // namespace flux::cuda::sm90
