// Block selection on CUDA: what the kernels of both families (sm80/select.cu, sm90/select.cu) share. They differ in how
// they multiply.
//
// A tile is kSelectRows rows (core/selection.h) of one sequence head: all heads of the group for one or several query
// blocks. Its scores against `columns` columns at a time, a step, are a product with an inner length of stride * D,
// which stays in registers. Of them remains, for each row and key block, the sum of the exponentials relative to the
// row's running maximum, in the scratch memory of the thread block. When a tile has seen all its columns, the final
// maxima and sums of its rows turn these sums into masses, and one warp per query block chooses.
#pragma once

#include "core/selection.h"
#include "cuda/addresses.h"
#include "cuda/cuda.h"
#include "cuda/sm80/tile.h"
#include "cuda/softmax.h"

namespace flux::cuda {

constexpr int kSelectRows = 128;
constexpr int kSelectInner = 64;                  // elements of the inner dimension that are loaded at a time
using SelectSlab = sm80::SmemTile<kSelectInner>;  // WGMMA's 128-byte swizzle is the same

// How the rows of a tile are query blocks, and the scratch memory of one thread block.
struct SelectTiling {
  int32_t block_rows;   // of one query block, all heads of the group
  int32_t q_blocks;     // of a tile
  int32_t passes;       // of kSelectRows rows each, to go through a tile
  int32_t cluster;      // tiles of an item: thread blocks that go through the columns together
  int32_t items_each;   // of a sequence head
  int32_t sums_stride;  // key blocks of all steps
  int32_t steps;

  FLUX_HD SelectTiling(const SelectParams& p, int32_t columns, int32_t cluster) : cluster(cluster) {
    block_rows = p.rows_per_block() * p.group();
    q_blocks = max_of(kSelectRows / block_rows, 1);
    passes = ceil_div(q_blocks * block_rows, kSelectRows);
    items_each = ceil_div(p.q_blocks, q_blocks * cluster);
    steps = max_of(ceil_div(ceil_div(p.kv.rows.capacity, p.stride), columns), 1);
    sums_stride = steps * columns / p.columns_per_block();
  }
  FLUX_HD int64_t floats(const SelectParams& p) const {
    return int64_t(kSelectRows) * (sums_stride + steps) + 2 * int64_t(q_blocks) * p.max_count;
  }
};

struct SelectKernelParams {
  SelectParams select;
  SelectTiling tiling;
  int32_t items;       // of all sequence heads
  float* scratch;      // [blocks of the grid, tiling.floats]
  int32_t* next_item;  // handed out beyond those that blocks start with; starts at 0
};

// Scratch memory of this thread block.
struct SelectScratch {
  float* sums;     // [kSelectRows, sums_stride], of exponentials
  float* maxima;   // [steps, kSelectRows] that they are relative to; then what makes masses of them
  float* mass;     // [q_blocks, max_count]
  int32_t* units;  // [q_blocks, max_count]

  __device__ explicit SelectScratch(const SelectKernelParams& k)
      : sums(k.scratch + blockIdx.x * k.tiling.floats(k.select)),
        maxima(sums + int64_t(kSelectRows) * k.tiling.sums_stride),
        mass(maxima + int64_t(kSelectRows) * k.tiling.steps),
        units(reinterpret_cast<int32_t*>(mass + int64_t(k.tiling.q_blocks) * k.select.max_count)) {}
};

// A tile and the columns that it meets.
struct SelectTile {
  Tile at;  // q_block: the first
  StridedView view;
  int32_t first_row;  // of the tile, among the rows of the sequence
  int32_t columns;    // that the last row of the item sees

  // Tile `rank` of an item.
  __device__ SelectTile(const SelectKernelParams& k, int32_t item, int32_t rank = 0)
      : at(tile_at(k, item, rank)),
        view(k.select, at.seq, at.kv_head),
        first_row(at.q_block * k.select.rows_per_block()) {
    const int32_t last = (at.q_block + (k.tiling.cluster - rank) * k.tiling.q_blocks) * k.select.rows_per_block();
    columns = view.rows() == 0 ? 0 : view.columns_of(min_of(last, view.rows()) - 1);
    if (first_row - rank * k.tiling.q_blocks * k.select.rows_per_block() >= view.rows()) columns = 0;
  }

  // The longest tiles of all sequence heads come first.
  static __device__ Tile tile_at(const SelectKernelParams& k, int32_t item, int32_t rank) {
    const int32_t heads = k.select.kv.num_heads, seq_heads = k.select.batch * heads, seq_head = item % seq_heads;
    const int32_t index = k.tiling.items_each - 1 - item / seq_heads;
    return {seq_head / heads, seq_head % heads, (index * k.tiling.cluster + rank) * k.tiling.q_blocks};
  }

  // Columns that row `row` of a pass sees; 0 in padding.
  __device__ int32_t seen(const SelectKernelParams& k, int32_t pass, int32_t row) const {
    const int32_t index = pass * kSelectRows + row;
    if (index >= k.tiling.q_blocks * k.tiling.block_rows) return 0;
    return view.columns_of(first_row + index / k.select.group());
  }
};

// Loads kRows rows of queries, or columns of keys, kSelectInner elements of the inner dimension at a time: eight
// threads to a row, each with one piece of 16 bytes of it. Zeros stand where there is no query or key. By kThreads
// threads.
template <typename T, int kThreads>
class SelectLoader {
 public:
  __device__ SelectLoader(const SelectKernelParams& k, const SelectTile& t, int32_t pass, int thread)
      : p_(k.select), piece_(thread % 8), row_(thread / 8), keys_(key_rows(k.select, t)) {
    const int32_t group = p_.group();
    queries_ = static_cast<const T*>(p_.q.data) + t.at.seq * p_.q.stride.b;
    key_data_ = static_cast<const T*>(p_.kv.k.data) + keys_.base;
#pragma unroll
    for (int i = 0; i < kQueryRows; ++i) {
      const int32_t index = pass * kSelectRows + row_ + i * kStep, row = index / group;
      const int32_t query = (t.first_row + row) * p_.stride;
      const bool in_tile = index < k.tiling.q_blocks * k.tiling.block_rows;
      left_[i] = in_tile ? t.view.q_rows.size() - query : 0;
      offset_[i] = int64_t(t.view.q_rows.begin + query) * p_.q.stride.s +
                   int64_t(t.at.kv_head * group + (index - row * group)) * p_.q.stride.h;
    }
  }

  // The slab `inner` (from element inner * kSelectInner on) of the pass's rows, and of kColumns columns.
  template <int kColumns>
  __device__ void load(SelectSlab rows, SelectSlab columns, int32_t first_column, int32_t inner) const {
    const int32_t element = inner * kSelectInner + piece_ * 8, token = element / p_.head_dim;
    const int32_t within = element - token * p_.head_dim;
    const int32_t query = p_.stride - 1 - token;
    const T* from = queries_ + query * p_.q.stride.s + within;
#pragma unroll
    for (int i = 0; i < kQueryRows; ++i) {
      const bool exists = query < left_[i];
      sm80::cp_async16(rows.at(row_ + i * kStep, piece_), exists ? from + offset_[i] : queries_, exists ? 16 : 0);
    }
    const int32_t key = (first_column + row_) * p_.stride + token, step = kStep * p_.stride;
    if (!keys_.pages) {
      const T* at = key_data_ + keys_.offset(key) + within;
      const int64_t bytes = int64_t(step) * keys_.row_stride;
#pragma unroll
      for (int i = 0; i < kColumns / kStep; ++i) {
        const bool exists = key + i * step < keys_.count;
        sm80::cp_async16(columns.at(row_ + i * kStep, piece_), exists ? at + i * bytes : key_data_, exists ? 16 : 0);
      }
    } else {
#pragma unroll 4
      for (int i = 0; i < kColumns / kStep; ++i) {
        const bool exists = key + i * step < keys_.count;
        sm80::cp_async16(columns.at(row_ + i * kStep, piece_),
                         exists ? key_data_ + keys_.offset(key + i * step) + within : key_data_, exists ? 16 : 0);
      }
    }
  }

 private:
  static constexpr int kStep = kThreads / 8, kQueryRows = kSelectRows / kStep;

  static __device__ KvRows key_rows(const SelectParams& p, const SelectTile& t) {
    TileView v{};
    v.tile = t.at;
    v.kv_rows = t.view.kv_rows;
    return kv_rows(p.kv, p.kv.k, v);
  }

  const SelectParams& p_;
  const int32_t piece_, row_;
  const KvRows keys_;
  const T *queries_, *key_data_;
  int64_t offset_[kQueryRows];
  int32_t left_[kQueryRows];  // queries from the row's first on
};

// Sums over the four lanes of a quad, of four numbers each; lane i gets the sum of number i.
__device__ inline float sum_of_quad(const float (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const float a = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const float b = (odd ? x[3] : x[2]) + __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  return (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, 2);
}

// A step's scores of one row become sums per key block. score(j, i): columns 8 j + 2 (lane % 4) + i, for j < kOctets,
// as the four lanes that share a row hold them. `seen`: columns from the step's first on.
template <int kOctets, int kRows, typename Score>
__device__ void absorb_row(OnlineSoftmax<kRows>& softmax, int r, Score score, float scale, int32_t seen,
                           int32_t columns_per_block, float* sums, float* maximum) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kOctets; ++j) score(j, 0) *= scale, score(j, 1) *= scale;
  if (seen < 8 * kOctets) {
#pragma unroll
    for (int j = 0; j < kOctets; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (8 * j + 2 * lane + i >= seen) score(j, i) = -INFINITY;
  }
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < kOctets; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = fmaxf(largest[i], score(j, i));
  softmax.raise(r, fmaxf(largest[0], largest[1]), 1.f);
  const float shift = softmax.shift(r, 1.f);
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < kOctets; ++j) {
    score(j, 0) = fast_exp2(score(j, 0) - shift) + fast_exp2(score(j, 1) - shift);
    sum += score(j, 0);
  }
  softmax.sum[r] += sum;
  if (lane == 0) *maximum = shift;
  if (columns_per_block == 4) {
#pragma unroll
    for (int j = 0; j < kOctets; j += 2) {
      const bool odd = lane & 1;
      const float x =
          (odd ? score(j + 1, 0) : score(j, 0)) + __shfl_xor_sync(~0u, odd ? score(j, 0) : score(j + 1, 0), 1);
      sums[2 * j + 2 * (lane & 1) + lane / 2] = x;
    }
  } else if (columns_per_block == 8) {
#pragma unroll
    for (int j = 0; j < kOctets; j += 4)
      sums[j + lane] = sum_of_quad({score(j, 0), score(j + 1, 0), score(j + 2, 0), score(j + 3, 0)});
  } else {
#pragma unroll
    for (int j = 0; j < kOctets; j += 8)
      sums[j / 2 + lane] = sum_of_quad({score(j, 0) + score(j + 1, 0), score(j + 2, 0) + score(j + 3, 0),
                                        score(j + 4, 0) + score(j + 5, 0), score(j + 6, 0) + score(j + 7, 0)});
  }
}

// Final states of the rows of a pass, in shared memory.
struct SelectRowStates {
  float max[kSelectRows];
  float factor[kSelectRows];  // 1 / sum; 0 where a row sees nothing
};

// Sums of a pass become masses: mass[b][j] (+)= sum over the rows of query block b. By kThreads threads, which `sync`
// holds together; all have written their sums and states before, and may read the masses after another `sync`.
template <int kThreads, int kColumns, typename Sync>
__device__ void add_masses(const SelectKernelParams& k, const SelectTile& t, int32_t pass, const SelectScratch& scratch,
                           const SelectRowStates& rows, int thread, Sync sync) {
  const SelectTiling& tiling = k.tiling;
  const int32_t steps = ceil_div(t.columns, kColumns), step_blocks = kColumns / k.select.columns_per_block();
  for (int32_t i = thread; i < steps * kSelectRows; i += kThreads) {
    const int32_t row = i % kSelectRows;
    const float factor = rows.factor[row];
    scratch.maxima[i] = factor == 0.f ? 0.f : fast_exp2(scratch.maxima[i] - rows.max[row]) * factor;
  }
  sync();
  const int32_t real = (t.view.rows() - t.first_row) * k.select.group() - pass * kSelectRows;  // rows of the pass
  const int32_t most = t.view.blocks_seen(t.at.q_block + tiling.q_blocks - 1);
  for (int32_t i = thread; i < tiling.q_blocks * most; i += kThreads) {
    const int32_t b = i / most, j = i - b * most;
    const int32_t begin = max_of(b * tiling.block_rows - pass * kSelectRows, 0);
    const int32_t end = min_of(min_of((b + 1) * tiling.block_rows - pass * kSelectRows, kSelectRows), real);
    if (begin >= end || j >= t.view.blocks_seen(t.at.q_block + b)) continue;
    const float* sums = scratch.sums + int64_t(begin) * tiling.sums_stride + j;
    const float* weight = scratch.maxima + j / step_blocks * kSelectRows + begin;
    float sum = 0.f;
#pragma unroll 16
    for (int32_t row = 0; row < end - begin; ++row) sum += sums[int64_t(row) * tiling.sums_stride] * weight[row];
    float& mass = scratch.mass[int64_t(b) * k.select.max_count + j];
    mass = pass == 0 ? sum : mass + sum;
  }
}

__device__ inline int32_t sum_of_warp(int32_t x) { return __reduce_add_sync(~0u, x); }
__device__ inline float sum_of_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

// The list of one query block from the masses of the blocks it sees. By one warp.
//
// Those that are not always kept, in descending order until the share is reached: all above a cutoff, which is found
// bit by bit, and of those at the cutoff the first few.
__device__ inline void keep_fewest(const SelectParams& p, const SelectTile& t, int32_t q_block, const float* mass,
                                   int32_t* units) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t seen = q_block < t.view.q_blocks() ? t.view.blocks_seen(q_block) : 0;
  float total = 0.f;
  for (int32_t j = lane; j < seen; j += 32) total += mass[j];
  total = sum_of_warp(total);
  const bool all = keeps_all(total, p.threshold);
  int32_t cutoff = -1, ties = 0;  // of units
  if (!all && seen > 0) {
    constexpr int kHeld = 8;  // of each lane, in registers; beyond, in memory
    int32_t held[kHeld], every = 0, always = 0;
    const auto to_units = [&](int32_t j) {
      int32_t x = j < seen ? share_units(mass[j], total) : -1;
      every += max_of(x, 0);
      if (j < seen && t.view.always(q_block, j)) always += x, x = -1;
      if (j < seen) units[j] = x;
      return x;
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = to_units(32 * i + lane);
    for (int32_t j = 32 * kHeld + lane; j < seen; j += 32) to_units(j);
    const auto sum_from = [&](int32_t least) {
      int32_t sum = 0;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) sum += held[i] >= least ? held[i] : 0;
      for (int32_t j = 32 * kHeld + lane; j < seen; j += 32) sum += units[j] >= least ? units[j] : 0;
      return sum_of_warp(sum);
    };
    const auto needed = int32_t(units_needed(sum_of_warp(every), p.threshold) - sum_of_warp(always));
    cutoff = needed > 0 ? 0 : int32_t(kShareUnits) + 1;
    for (int32_t bit = int32_t(kShareUnits); needed > 0 && bit > 0; bit /= 2)
      if (sum_from(cutoff + bit) >= needed) cutoff += bit;
    if (needed > 0) ties = ceil_div(needed - sum_from(cutoff + 1), max_of(cutoff, 1));
  }
  const int64_t list = p.list(t.at.seq, t.at.kv_head, q_block);
  int32_t* blocks = p.blocks + list * p.max_count;
  int32_t count = 0;
  for (int32_t begin = 0; begin < seen; begin += 32) {
    const int32_t j = begin + lane, x = all || j >= seen ? 0 : units[j];
    const uint32_t before = (1u << lane) - 1, tied = __ballot_sync(~0u, j < seen && x == cutoff);
    const bool kept = j < seen && (all || x < 0 || x > cutoff || (x == cutoff && __popc(tied & before) < ties));
    const uint32_t mask = __ballot_sync(~0u, kept);
    if (kept) blocks[count + __popc(mask & before)] = j;
    count += __popc(mask);
    ties -= __popc(tied);
  }
  for (int32_t j = count + lane; j < p.max_count; j += 32) blocks[j] = 0;
  if (lane == 0) p.counts[list] = count;
}

// The lists of a tile, one warp each; after the masses of all passes.
template <int kThreads>
__device__ void write_lists(const SelectKernelParams& k, const SelectTile& t, const SelectScratch& scratch,
                            int thread) {
  for (int32_t b = thread / 32; b < k.tiling.q_blocks && t.at.q_block + b < k.select.q_blocks; b += kThreads / 32) {
    const int64_t at = int64_t(b) * k.select.max_count;
    keep_fewest(k.select, t, t.at.q_block + b, scratch.mass + at, scratch.units + at);
  }
}

// A compiled kernel.
struct SelectInstance {
  int32_t columns;  // of a step
  int32_t cluster;  // thread blocks of a cluster, with one tile of an item each
  bool (*fits)(const SelectParams& p);
  int (*most_blocks)(const SelectParams& p, const Device& device);  // that run at once; 0: an error
  cudaError_t (*launch)(const SelectKernelParams& k, int32_t blocks, cudaStream_t stream);
};
namespace sm80 {
extern const SelectInstance kSelect;
}
namespace sm90 {
extern const SelectInstance kSelectByTma, kSelect;
}

}  // namespace flux::cuda
