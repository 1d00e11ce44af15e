// Stage 4: the pieces of cut tiles, merged in the order of their workers.
#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"
#include "cuda/epilogue.h"
#include "cuda/plan.h"

namespace flux::cuda {
namespace {

constexpr int kWarps = 4;     // of a block that merges one row
constexpr int kRowWarps = 8;  // of a block that merges several
constexpr int kRowBlocks = 4;

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

// At most kRowBlocks blocks per worker, one warp per row, four elements a lane. The worker that holds the first piece
// of a cut tile leads it; its pieces are the worker's own and those of the workers after it that start inside the tile.
// (Where nothing was cut all blocks leave at once, and should not be many.)
template <typename T>
__global__ void __launch_bounds__(32 * kRowWarps, 4)
    combine_kernel(const __grid_constant__ AttendParams p, const TileShape tile_shape, const PlanView plan,
                   const Partials partials, const int32_t num_workers) {
  wait_for_previous();
  let_next_start();
  const int32_t leader = blockIdx.x;
  const PlanHeader header = *plan.header;
  const WorkRange range = plan.ranges[leader];
  if (header.whole_tiles || leader >= header.num_items) return;
  const int32_t tile = leads_tile(range);
  if (tile < 0) return;
  const int lane = threadIdx.x % 32;
  const TileView view = view_tile(p, tile_shape, plan.tiles[tile]);
  TilePieces pieces{1, leader, partial_slot(range, leader, tile)};
  for (int32_t w = leader + 1 + lane;; w += 32) {
    const bool joins = w < num_workers && plan.ranges[w].tile == tile && plan.ranges[w].block > 0;
    const int32_t joined = __popc(__ballot_sync(~0u, joins));
    pieces.count += joined;
    if (joined < 32) break;
  }
  for (int32_t row = blockIdx.y * kRowWarps + threadIdx.x / 32; row < valid_rows(p, view);
       row += gridDim.y * kRowWarps) {
    const PieceRow from(partials, pieces, row, 0, 1);
    const RowWriter<T> to(p, view, row);
    for (int32_t d = 4 * lane; d < p.head_dim; d += 128) to.write(d, from.merge<4>(d));
  }
}

// The four warps of a block share the pieces of a row, so that all loads are under way at once.
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

// The same after the plan of a decode step, which every block makes again (see line_up): one block per tile and row.
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

// The same after a prefill kernel that planned few tiles for itself. No block of this one starts beside it, so it has
// left its plan, the ranges of its workers. One block per tile and row, or, where there are many rows (kRowsEach), one
// for every kWarps of them: a warp takes a row, and one piece after the other.
template <typename T, bool kRowsEach>
__global__ void __launch_bounds__(32 * kWarps, 5)
    combine_few_kernel(const __grid_constant__ AttendParams p, const TileShape tile_shape, const PlanView plan,
                       const Partials partials, const int32_t num_workers) {
  __shared__ __align__(16) unsigned char view_memory[sizeof(TileView)];  // members have initial values
  auto& view = *reinterpret_cast<TileView*>(view_memory);
  const int32_t tile = blockIdx.x, row = kRowsEach ? blockIdx.y * kWarps + threadIdx.x / 32 : blockIdx.y;
  wait_for_previous();
  let_next_start();
  if (threadIdx.x == 0) view = view_in_order(p, tile_shape, TileOrder::kInLine, tiles_each(p, tile_shape), tile);
  const TilePieces pieces = pieces_of(plan.ranges, num_workers, tile);
  __syncthreads();
  if (pieces.count == 0 || row >= valid_rows(p, view)) return;
  const RowWriter<T> to(p, view, row);
  if constexpr (kRowsEach) {
    const PieceRow from(partials, pieces, row, 0, 1);
    for (int32_t d = 4 * int32_t(threadIdx.x % 32); d < p.head_dim; d += 128) to.write(d, from.merge<4>(d));
  } else {
    merge_row(p, PieceRow(partials, pieces, row, threadIdx.x / 32, kWarps), to);
  }
}

// So many blocks with a row each run at once on the smallest GPU of the Hopper family; more would come in waves.
constexpr int32_t kRowsAtOnce = 512;

template <typename T>
cudaError_t launch(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  if (c.inline_plan && c.instance->tile_rows > kDecodeRows) {
    const int32_t num_tiles = tiles_each(p, c.tile) * num_seq_heads(p);
    const int32_t rows = min_of(p.q.max_len, c.tile.q_tokens) * p.group();
    const bool few_rows = num_tiles * rows <= kRowsAtOnce;
    return cuda::launch(few_rows ? combine_few_kernel<T, false> : combine_few_kernel<T, true>,
                        dim3(num_tiles, few_rows ? rows : ceil_div(rows, kWarps)), 32 * kWarps, 0, stream, c.overlap, p,
                        c.tile, w.plan, w.partials, c.num_workers);
  }
  if (c.inline_plan) {
    const dim3 grid(num_seq_heads(p), max_of(int32_t(most_rows(p)), 1));
    return cuda::launch(combine_inline_kernel<T>, grid, 32 * kWarps, 0, stream, c.overlap, p, c.tile, w.partials,
                        c.num_workers);
  }
  const dim3 grid(c.num_workers, min_of(ceil_div(c.instance->tile_rows, kRowWarps), kRowBlocks));
  return cuda::launch(combine_kernel<T>, grid, 32 * kRowWarps, 0, stream, c.overlap, p, c.tile, w.plan, w.partials,
                      c.num_workers);
}

}  // namespace

cudaError_t combine(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch<__half>(p, c, w, stream) : launch<__nv_bfloat16>(p, c, w, stream);
}

}  // namespace flux::cuda
