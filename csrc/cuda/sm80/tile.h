// Rows of kDim elements in shared memory: swizzled, filled by cp.async, read as tensor-core fragments.
#pragma once

#include "cuda/addresses.h"
#include "cuda/sm80/ptx.h"

namespace flux::cuda::sm80 {

template <int kDim>
struct SmemTile {
  static_assert(kDim % 32 == 0, "a row is a multiple of four chunks");
  static constexpr int kChunks = kDim / 8;  // of 16 bytes
  static constexpr int kRowBytes = 2 * kDim;
  // Chunks are permuted within groups of kPhases, so that eight rows of one chunk column, which is what ldmatrix reads
  // at a time, lie in different banks.
  static constexpr int kPhases = kChunks % 8 == 0 ? 8 : 4;

  uint32_t base;  // shared address

  static __device__ int phase(int row) { return kPhases == 8 ? row & 7 : (row >> 1) & 3; }
  static __device__ uint32_t offset(int row, int chunk) { return row * kRowBytes + (chunk ^ phase(row)) * 16; }
  __device__ uint32_t at(int row, int chunk) const { return base + offset(row, chunk); }

  // The address `row` rows (a multiple of 16) and `chunk` chunks (even) beyond the one at lane_offset. The swizzle
  // depends on row mod 8 alone, so what is added is mostly a constant of the compiler.
  __device__ uint32_t after(uint32_t lane_offset, int row, int chunk) const {
    return base + (lane_offset ^ (chunk % kPhases * 16)) + row * kRowBytes + chunk / kPhases * kPhases * 16;
  }

  // Fragment of rows [row, row + 16) and chunks {chunk, chunk + 1}: the left operand of mma.
  __device__ void left(uint32_t (&r)[4], int row, int chunk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, after(offset(lane % 16, lane / 16), row, chunk));
  }
  // Right operand whose columns are rows [row, row + 16) here: r[0], r[1] for the first eight, r[2], r[3] the others.
  __device__ void right(uint32_t (&r)[4], int row, int chunk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix(r, after(offset(lane % 8 + lane / 16 * 8, lane / 8 % 2), row, chunk));
  }
  // Right operand whose columns are the elements of chunk (r[0], r[1]) and chunk + 1 (r[2], r[3]).
  __device__ void right_transposed(uint32_t (&r)[4], int row, int chunk) const {
    const int lane = threadIdx.x % 32;
    ldmatrix_transposed(r, after(offset(lane % 16, lane / 16), row, chunk));
  }
};

// Loads kRows keys or values of one sequence by kThreads threads; a thread keeps to one chunk column. Zeros stand
// outside the sequence and beyond the head dimension, so whatever is in unused rows of a cache never reaches the
// arithmetic.
template <typename T, int kDim, int kRows, int kThreads>
struct RowLoader {
  using Tile = SmemTile<kDim>;
  static constexpr int kColumns = kDim <= 64 ? 8 : kDim <= 128 ? 16 : 32;  // a power of two, so some may be idle
  static constexpr int kStep = kThreads / kColumns;                        // rows that load at a time
  static_assert(kRows % kStep == 0 && (kStep & (kStep - 1)) == 0, "rows split into an index and a power of two");

  KvRows rows;
  const T* column;     // of row 0 of the tensor (of page 0)
  uint32_t shared;     // offset in a tile of this thread's first chunk
  int32_t row, valid;  // its first row; rows of the sequence (0: an idle column)
  bool in_one_piece;   // kRows rows always stand beside each other

  __device__ RowLoader(const AttendParams& p, const View& global, const TileView& v, int thread)
      : rows(kv_rows(p.kv, global, v)) {
    const int chunk = thread % kColumns;
    row = thread / kColumns;
    valid = chunk * 8 < p.head_dim ? rows.count : 0;
    shared = Tile::offset(row, chunk);
    column = static_cast<const T*>(global.data) + rows.base + chunk * 8;
    in_one_piece = !rows.pages || (rows.first % kRows == 0 && rows.page_size % kRows == 0);
  }

  // Keys from kv_begin on, a multiple of kRows.
  __device__ void operator()(Tile tile, int32_t kv_begin) const {
    if (kColumns > Tile::kChunks && threadIdx.x % kColumns >= Tile::kChunks) return;
    const int32_t left = kv_begin < 0 ? 0 : valid - kv_begin;  // rows that exist from kv_begin on
    if (in_one_piece) {
      const int64_t step = kStep * rows.row_stride;
      const T* from = column;
      if (left > 0) from += rows.offset(kv_begin) + row * rows.row_stride;
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i)
        cp_async16(address(tile, i), from + i * step, row + i * kStep < left ? 16 : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kStep; ++i) {
        const bool exists = row + i * kStep < left;
        cp_async16(tile.base + Tile::offset(row + i * kStep, threadIdx.x % kColumns),
                   exists ? column + rows.offset(kv_begin + row + i * kStep) : column, exists ? 16 : 0);
      }
    }
  }

 private:
  __device__ uint32_t address(Tile tile, int i) const {
    return tile.base + (shared ^ (Tile::phase(i * kStep) * 16)) + i * kStep * Tile::kRowBytes;
  }
};

}  // namespace flux::cuda::sm80
