// Stage 4: the pieces of cut tiles, merged in an order that the plan gives.
#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"
#include "cuda/epilogue.h"
#include "cuda/plan.h"
#include "cuda/shared.h"
#include "cuda/sm80/ptx.h"
#include "cuda/softmax.h"

namespace flux::cuda {
namespace {

constexpr int kWarps = 4;     // of a block that merges one row
constexpr int kRowWarps = 8;  // of a block that merges several
constexpr int kLoads = 8;     // pieces that a warp of the latter has under way

// Four elements of a row, not normalised.
struct Sum {
  SoftmaxState state;
  float4 out{0.f, 0.f, 0.f, 0.f};
};

template <int n>
__device__ Sum merge_sums(const Sum (&sums)[n]) {
  SoftmaxState states[n];
  float factor[n];
  for (int i = 0; i < n; ++i) states[i] = sums[i].state;
  Sum all{merge(states, factor)};
  for (int i = 0; i < n; ++i) all.out = add_scaled(all.out, sums[i].out, factor[i]);
  return all;
}

// What one thread merges of a row: the pieces first, first + step, ...
class PieceRow {
 public:
  __device__ PieceRow(const Partials& partials, const TilePieces& pieces, int32_t row, int32_t first, int32_t step)
      : pieces_(pieces),
        first_(first),
        step_(step),
        state_bytes_(int32_t(sizeof(SoftmaxState)) * partials.tile_rows),
        out_bytes_(int32_t(sizeof(float)) * partials.tile_rows * partials.head_dim),
        state_(reinterpret_cast<const char*>(&partials.state_of(0, row))),
        out_(reinterpret_cast<const char*>(partials.out_row(0, row))) {
    work_out(state_);
    work_out(out_);
  }

  // Elements [d, d + 4), kAtOnce pieces at a time: no load waits for another.
  template <int kAtOnce>
  __device__ Sum merge(int32_t d) const {
    Sum all;
    for (int32_t begin = first_; begin < pieces_.count; begin += kAtOnce * step_) {
      Sum sums[kAtOnce + 1];
      sums[kAtOnce] = all;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t piece = begin + i * step_;
        if (piece >= pieces_.count) continue;
        const int64_t slot = pieces_.slot(piece);
        sums[i].state = *reinterpret_cast<const SoftmaxState*>(state_ + slot * state_bytes_);
        sums[i].out = *reinterpret_cast<const float4*>(out_ + 4 * d + slot * out_bytes_);
      }
      all = merge_sums(sums);
    }
    return all;
  }

 private:
  TilePieces pieces_;
  int32_t first_, step_;
  int32_t state_bytes_, out_bytes_;  // of a slot
  const char *state_, *out_;         // of slot 0
};

// Where a row goes.
template <typename T>
class RowWriter {
 public:
  __device__ RowWriter(const AttendParams& p, const TileView& view, int32_t row)
      : view_(view), at_(tile_row(p, view, row)) {
    out_ = out_row<T>(p, view, at_);
    lse_ = &lse_at(p, view, at_);
    work_out(out_);
    work_out(lse_);
  }
  __device__ void write(int32_t d, const Sum& sum) const {
    const RowNorm norm(view_, at_, sum.state);
    *reinterpret_cast<uint2*>(out_ + d) = pack_four<T>(norm, sum.out);
    if (d == 0) *lse_ = sum.state.lse();
  }

 private:
  const TileView& view_;
  const TileRow at_;
  T* out_;
  float* lse_;
};

// One row: the four warps of a block share its pieces, so that all loads are under way at once.
template <typename T>
__device__ void merge_row(const AttendParams& p, const PieceRow& from, const RowWriter<T>& to) {
  __shared__ __align__(16) unsigned char memory[sizeof(Sum) * kWarps * 32];  // members have initial values
  auto* sums = reinterpret_cast<Sum*>(memory);                               // [kWarps, 32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int32_t first_dim = 0; first_dim < p.head_dim; first_dim += 128) {
    const int32_t d = min_of(first_dim + 4 * lane, p.head_dim - 4);  // lanes beyond the end repeat the last ones
    if (first_dim > 0) __syncthreads();
    sums[threadIdx.x] = from.merge<kPiecesAtOnce / kWarps>(d);
    __syncthreads();
    if (warp == 0) {
      Sum parts[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) parts[w] = sums[w * 32 + lane];
      to.write(d, merge_sums(parts));
    }
  }
}

// After the plan of a decode step, which every block makes again (see line_up): one block per tile and row.
// All that can be worked out while the attend kernel still runs stands before the wait for it.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 5)  // registers to start beside the attend kernel
    combine_inline_kernel(const __grid_constant__ AttendParams p, const TileShape tile_shape, const Partials partials,
                          const int32_t num_workers) {
  __shared__ InlineLine line;
  __shared__ __align__(16) unsigned char view_memory[sizeof(TileView)];  // members have initial values
  auto& view = *reinterpret_cast<TileView*>(view_memory);
  const int32_t tile = blockIdx.x, row = blockIdx.y;
  const int32_t num_tiles = line_up<32 * kWarps>(p, tile_shape, num_workers, line, [&](int32_t t, const TileView& own) {
    if (t == tile) view = own;
  });
  const TilePieces pieces = tile_pieces(line.begin, num_tiles, tile, line.workers);
  if (pieces.count == 1 || row >= valid_rows(p, view)) {
    wait_for_previous();  // even so: the kernel after this one relies on the one before this one having ended
    let_next_start();
    return;
  }
  const PieceRow from(partials, pieces, row, threadIdx.x / 32, kWarps);
  const RowWriter<T> to(p, view, row);
  wait_for_previous();
  let_next_start();
  merge_row(p, from, to);
}

// The largest, and the sum, of kLanes neighbouring lanes, in each of them.
template <int kLanes>
__device__ float largest_of_lanes(float x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
template <int kLanes>
__device__ float sum_of_lanes(float x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// What the threads of a block have under way, each its own. Copies to shared memory take no registers, and the compiler
// cannot put what waits for one of them before the others.
struct Staged {
  float4 outs[kLoads][32 * kRowWarps];
  SoftmaxState states[32 * kRowWarps];
};

// Rows [row, row + kRows) of a tile, merged by one warp; those from end_row on are the last one again. kLoads pieces
// are under way together. Each lane has four columns of all rows; what one piece of one row counts, and where the row
// goes, is worked out by one of kLoads lanes (and the same by every kLoads-th after it).
template <typename T, int kRows>
class WarpRows {
 public:
  // Needs no pieces, so it stands before the wait.
  __device__ WarpRows(const AttendParams& p, int32_t group, const TileView& view, int32_t row, int32_t end_row)
      : row_(row), last_(end_row - 1), own_row_(row_at(int32_t(threadIdx.x) / kPieces % kRows)) {
    const TileRow at = tile_row(group, view, own_row_);
    out_ = row_offset(p.out.stride, view, at);
    lse_ = &lse_at(p, view, at);
    sees_any_ = row < end_row && view.sees_any(at.token);
    work_out(static_cast<T*>(p.out.data) + out_), work_out(lse_), work_out(int32_t(sees_any_));
  }

  __device__ void merge(const AttendParams& p, const Partials& partials, const TilePieces& pieces,
                        Staged& staged) const {
    const int32_t lane = threadIdx.x % 32;
    for (int32_t first_dim = 0; first_dim < p.head_dim; first_dim += 128) {
      const int32_t d = min_of(first_dim + 4 * lane, p.head_dim - 4);  // lanes beyond the end repeat the last ones
      SoftmaxState all;                                                // of the lane's row
      float4 sums[kRows] = {};
      const auto add = [&](int32_t first) {
        const SoftmaxState own = load(partials, pieces, first, d, staged), before = all;
        all.max = fmaxf(before.max, largest_of_lanes<kPieces>(own.max));
        const float kept = before.empty() ? 0.f : fast_exp2(before.max - all.max);
        const float factor = own.empty() ? 0.f : fast_exp2(own.max - all.max);
        all.sum = before.sum * kept + sum_of_lanes<kPieces>(own.sum * factor);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sums[r] = add_scaled({}, sums[r], of_row(kept, r));
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            sums[r] = add_scaled(sums[r], staged.outs[r * kPieces + i][threadIdx.x],
                                 __shfl_sync(~0u, factor, r * kPieces + i));
        }
      };
      add(0);  // by itself: before a loop the compiler works out more, and mostly these are all pieces
      for (int32_t first = kPieces; first < pieces.count; first += kPieces) add(first);
      const float normal = fast_reciprocal(all.sum);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const RowNorm norm(of_row(int32_t(sees_any_), r), of_row(normal, r));
        *reinterpret_cast<uint2*>(static_cast<T*>(p.out.data) + of_row(out_, r) + d) = pack_four<T>(norm, sums[r]);
      }
      if (first_dim == 0 && lane % kPieces == 0) *lse_ = all.lse();
    }
  }

 private:
  static constexpr int kPieces = kLoads / kRows;  // of a row that are under way

  __device__ int32_t row_at(int32_t r) const { return min_of(row_ + r, last_); }

  template <typename Value>
  static __device__ Value of_row(Value own, int r) {
    return kRows == 1 ? own : __shfl_sync(~0u, own, r * kPieces);
  }

  // The outputs of pieces first, first + 1, ... go to `staged`; returns the state of the lane's own.
  __device__ SoftmaxState load(const Partials& partials, const TilePieces& pieces, int32_t first, int32_t d,
                               Staged& staged) const {
    const int32_t own = first + int32_t(threadIdx.x) % kPieces;
    SoftmaxState& state = staged.states[threadIdx.x];
    if (own < pieces.count) {
      const SoftmaxState& from = partials.state_of(pieces.slot(own), own_row_);
      sm80::cp_async4(sm80::shared_address(&state.max), &from.max);
      sm80::cp_async4(sm80::shared_address(&state.sum), &from.sum);
    }
    const char* outs = reinterpret_cast<const char*>(partials.out);
    const uint32_t row_bytes = uint32_t(sizeof(float)) * partials.head_dim;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t row = pieces.slot(first + i) * partials.tile_rows + row_at(r);
        // 32 bits hold the offset: a worker has 256 KiB at most.
        sm80::cp_async16(sm80::shared_address(&staged.outs[r * kPieces + i][threadIdx.x]),
                         outs + (row * row_bytes + uint32_t(sizeof(float)) * d), first + i < pieces.count ? 16 : 0);
      }
    sm80::cp_async_commit();
    sm80::cp_async_wait<0>();
    return own < pieces.count ? state : SoftmaxState{};
  }

  int32_t row_, last_, own_row_;  // the first row, the last of all, and the lane's
  int64_t out_;                   // where the lane's row goes, in elements
  float* lse_;
  bool sees_any_;
};

// Of a prefill kernel that planned few tiles for itself (see plans_few).
__device__ TileView view_of_few(const AttendParams& p, const TileShape& tile_shape, int32_t tile) {
  return view_in_order(p, tile_shape, TileOrder::kInLine, tiles_each(p, tile_shape), tile);
}

// The blocks (b, ...) merge one tile, `warp_rows` rows a warp. After a plan kernel it is the tile of which worker b
// holds the first piece, if it does; the others are those of the workers after it that start inside the tile. Of few
// tiles (kFew) it is tile b; their workers have left their ranges.
//
// All but what needs those ranges stands before the wait. It costs nothing if the multiprocessors that the attend
// kernel leaves first hold all blocks, so there are few, and those with nothing to merge make room.
template <typename T, int kRows, bool kFew>
__global__ void __launch_bounds__(32 * kRowWarps, 3)
    combine_kernel(const __grid_constant__ AttendParams p, const TileShape tile_shape,
                   const __grid_constant__ PlanView plan, const __grid_constant__ Partials partials,
                   const int32_t num_workers, const int32_t warp_rows) {
  __shared__ Shared<TileView> shared_view;
  int32_t tile = blockIdx.x;
  if constexpr (!kFew) {  // what the plan kernel wrote may be read: attend, which waited for it, has started this one
    const PlanHeader header = *plan.header;
    const WorkRange range = plan.ranges[blockIdx.x];
    tile = header.whole_tiles || tile >= header.num_items ? -1 : leads_tile(range);
    if (tile < 0) {
      // Some block must wait even so: the kernel after this one relies on the one before this one having ended.
      if (blockIdx.x == 0) wait_for_previous();
      return;
    }
  }
  const TileView& view = shared_view.make(
      [&] { return kFew ? view_of_few(p, tile_shape, tile) : view_tile(p, tile_shape, plan.tiles[tile]); });
  const int32_t group = p.group(), warp = __shfl_sync(~0u, int32_t(threadIdx.x) / 32, 0);  // known to be the warp's
  int32_t row = (blockIdx.y * kRowWarps + warp) * warp_rows;
  const int32_t end_row = min_of(row + warp_rows, valid_rows(p, view));
  WarpRows<T, kRows> rows(p, group, view, row, end_row);
  TilePieces pieces{};
  if constexpr (!kFew) {
    pieces = pieces_of(plan.ranges, blockIdx.x, num_workers, tile);
    work_out(pieces.count), work_out(pieces.leader_slot);
  }
  touch(p, plan, partials);
  wait_for_previous();
  let_next_start();
  if (row >= end_row) return;
  if constexpr (kFew) pieces = pieces_of(plan.ranges, 0, num_workers, tile);
  if (pieces.count == 0) return;
  for (;;) {
    rows.merge(p, partials, pieces, *reinterpret_cast<Staged*>(sm80::shared_memory()));
    row += kRows;
    if (row >= end_row) return;
    rows = WarpRows<T, kRows>(p, group, view, row, end_row);
  }
}

// The same where few tiles have few rows: one block for each row.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 5)
    combine_row_kernel(const __grid_constant__ AttendParams p, const TileShape tile_shape,
                       const __grid_constant__ PlanView plan, const __grid_constant__ Partials partials,
                       const int32_t num_workers) {
  __shared__ Shared<TileView> shared_view;
  const int32_t tile = blockIdx.x, row = blockIdx.y;
  const TileView& view = shared_view.make([&] { return view_of_few(p, tile_shape, tile); });
  const RowWriter<T> to(p, view, row);
  touch(p, plan, partials);
  wait_for_previous();
  let_next_start();
  if (row >= valid_rows(p, view)) return;
  const TilePieces pieces = pieces_of(plan.ranges, 0, num_workers, tile);
  if (pieces.count > 0) merge_row(p, PieceRow(partials, pieces, row, threadIdx.x / 32, kWarps), to);
}

// So many blocks with a row each run at once on the smallest GPU of the Hopper family; more would come in waves.
constexpr int32_t kRowsAtOnce = 512;
// So many warps for each worker run at once on two thirds of the multiprocessors, if each has one worker.
constexpr int32_t kWarpsEach = 16;

// `num_tiles`: that may be cut.
template <typename T, bool kFew>
cudaError_t launch_rows(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream,
                        int32_t num_tiles, int32_t tile_rows) {
  const int64_t rows = int64_t(num_tiles) * tile_rows;
  const auto warp_rows = max_of(int32_t(ceil_div_64(rows, int64_t(kWarpsEach) * c.num_workers)), 1);
  const auto kernel = warp_rows == 1   ? combine_kernel<T, 1, kFew>
                      : warp_rows == 2 ? combine_kernel<T, 2, kFew>
                                       : combine_kernel<T, 4, kFew>;
  const dim3 grid(kFew ? num_tiles : c.num_workers, ceil_div(tile_rows, kRowWarps * warp_rows));
  return cuda::launch(kernel, grid, 32 * kRowWarps, sizeof(Staged), stream, c.overlap, p, c.tile, w.plan, w.partials,
                      c.num_workers, warp_rows);
}

template <typename T>
cudaError_t launch(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  if (c.inline_plan && c.instance->tile_rows <= kDecodeRows) {
    const dim3 grid(num_seq_heads(p), max_of(int32_t(most_rows(p)), 1));
    return cuda::launch(combine_inline_kernel<T>, grid, 32 * kWarps, 0, stream, c.overlap, p, c.tile, w.partials,
                        c.num_workers);
  }
  const int32_t tile_rows = max_of(min_of(p.q.max_len, c.tile.q_tokens), 1) * p.group();
  if (!c.inline_plan) {
    const int64_t most = c.num_workers;  // a worker holds the first piece of one tile at most
    return launch_rows<T, false>(p, c, w, stream, int32_t(min_of(max_tiles(p, c.tile), most)), tile_rows);
  }
  const int32_t num_tiles = tiles_each(p, c.tile) * num_seq_heads(p);
  if (num_tiles * tile_rows > kRowsAtOnce) return launch_rows<T, true>(p, c, w, stream, num_tiles, tile_rows);
  return cuda::launch(combine_row_kernel<T>, dim3(num_tiles, tile_rows), 32 * kWarps, 0, stream, c.overlap, p, c.tile,
                      w.plan, w.partials, c.num_workers);
}

}  // namespace

cudaError_t combine(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch<__half>(p, c, w, stream) : launch<__nv_bfloat16>(p, c, w, stream);
}

}  // namespace flux::cuda
