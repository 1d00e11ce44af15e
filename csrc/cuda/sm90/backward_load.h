// How tiles and what is known of rows come to the gradient kernels' shared memory: by cp.async, which reads rows of any
// layout and group, into the layout that TMA would write (Traits, traits.h). For a warpgroup that does nothing else.
//
// The loads of a block must not take longer than its products, so addresses go from one to the next by adding wherever
// a number of rows is a whole number of queries; a division takes as long as many loads.
#pragma once

#include "cuda/backward.h"
#include "cuda/sm90/traits.h"

namespace flux::cuda::sm90 {

constexpr int kLoadThreads = 128;

// A tile in shared memory as slabs of kSlab columns, rows of 128 (or 64) bytes, swizzled.
template <int kDim, int kRows>
struct SlabTile {
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
  static constexpr int kColumns = Tile::kChunks <= 8 ? 8 : 16, kStep = kLoadThreads / kColumns;
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
// blocks follow from the first; else a block begins with a division.
template <typename T, int kRows, typename Tile>
class RowLoader {
 public:
  CUTLASS_DEVICE RowLoader(const AttendBackwardParams& b, const TileView& seq_head) : b_(b), seq_head_(seq_head) {
    const int32_t group = b.forward.group();
    whole_ = Thread::kStep % group == 0;
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
    if (whole_) {
      const auto copy_whole = [&](Tile tile, const void* data, int64_t offset, const Strides& stride) {
        const int64_t step = Thread::kStep / group * stride.s;
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
  bool whole_;
  int64_t q_, grad_;  // of this thread's first row
};

// What is known of blocks of kRows rows; see load_visited_rows.
template <int kRows>
class RowFactsLoader {
 public:
  CUTLASS_DEVICE RowFactsLoader(const AttendBackwardParams& b, const BackwardWorkspace& w, const TileView& seq_head,
                                const Span& owned_keys)
      : b_(b), w_(w), seq_head_(seq_head), keys_(owned_keys) {
    const int32_t group = b.forward.group();
    if (kRows % group != 0) return;
    tokens_ = kRows / group;
    const TileRow at = tile_row(b.forward, seq_head, int32_t(threadIdx.x));
    token_ = at.token;
    from_ = row_offset(w.row, seq_head, at);
  }

  CUTLASS_DEVICE void load(int32_t block, VisitedRows<kRows>& rows) const {
    if (tokens_ == 0) return load_visited_rows(b_, w_, seq_head_, keys_, block * kRows, rows);
    const int32_t i = threadIdx.x, first = block * tokens_, token = first + token_;
    if (i >= kRows) return;
    const int32_t q_pos = seq_head_.q_pos + first;
    const bool exists = token < seq_head_.q_rows.size();
    const QueryRange queries{seq_head_.pattern, seq_head_.list, seq_head_.kv_rows, q_pos,
                             min_of(q_pos + tokens_, seq_head_.q_pos_end())};
    const bool needs_mask =
        keys_.end - 1 > q_pos || (!seq_head_.hides_only_later_keys() && TileMask(queries)(keys_.begin, keys_.end));
    if (i == 0) rows.needs_mask = needs_mask;
    if (exists) {
      const int64_t from = from_ + first * w_.row.s;
      sm80::cp_async4(sm80::shared_address(&rows.lse[i]), w_.lse + from);
      sm80::cp_async4(sm80::shared_address(&rows.delta[i]), w_.delta + from);
    } else {
      rows.lse[i] = INFINITY, rows.delta[i] = 0.f;
    }
    if (needs_mask) rows.keys[i] = exists ? seq_head_.visible_keys(token) : VisibleKeys{};
  }

 private:
  const AttendBackwardParams& b_;
  const BackwardWorkspace& w_;
  const TileView& seq_head_;
  const Span keys_;
  int32_t tokens_ = 0, token_ = 0;  // of a block, or 0: each is found anew; of this thread's row, in the first block
  int64_t from_ = 0;
};

}  // namespace flux::cuda::sm90
