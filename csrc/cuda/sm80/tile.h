// Rows of kDim elements in shared memory: swizzled, filled by cp.async, read as tensor-core fragments.
#pragma once

#include "cuda/rows.h"
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

  static __device__ uint32_t offset(int row, int chunk) {
    const int phase = kPhases == 8 ? row & 7 : (row >> 1) & 3;
    return row * kRowBytes + (chunk ^ phase) * 16;
  }
  __device__ uint32_t at(int row, int chunk) const { return base + offset(row, chunk); }

  // The address `row` rows (a multiple of 16) and `chunk` chunks (even) after a lane's own: mostly an immediate.
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

// kRows keys (or values) from kv_begin on, by kThreads threads; zeros outside the sequence and beyond `dim`, so that
// whatever stands in unused rows of a cache never reaches the arithmetic.
template <int kRows, int kThreads, int kDim, typename T>
__device__ void load_keys(SmemTile<kDim> tile, const T* global, const KvRows& rows, int32_t kv_begin, int32_t dim,
                          int thread) {
  constexpr int kChunks = SmemTile<kDim>::kChunks;
  static_assert(kRows * kChunks % kThreads == 0, "every thread loads as much");
#pragma unroll 4  // more addresses at a time would cost too many registers
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = i * kThreads + thread, row = index / kChunks, chunk = index % kChunks;
    const int32_t kv_pos = kv_begin + row;
    const bool valid = rows.contains(kv_pos) && chunk * 8 < dim;
    cp_async16(tile.at(row, chunk), valid ? global + rows(kv_pos) + chunk * 8 : global, valid);
  }
}

}  // namespace flux::cuda::sm80
