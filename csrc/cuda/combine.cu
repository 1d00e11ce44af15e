// Stage 4: the pieces of cut tiles, merged in the order of their workers.
#include "cuda/cuda.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

namespace flux::cuda {
namespace {

constexpr int kWarps = 4;

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// One block per worker and `kWarps` rows. The worker that holds the first piece of a cut tile leads it; its pieces are
// the worker's own and those of the workers after it that start inside the tile. One warp per row, four elements a
// lane.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 4)
    combine_kernel(const __grid_constant__ AttendParams p, const TileShape tile_shape, const PlanView plan,
                   const Partials partials, const int32_t num_workers) {
  wait_for_previous();
  const int32_t leader = blockIdx.x;
  const PlanHeader header = *plan.header;
  const WorkRange range = plan.ranges[leader];
  if (header.whole_tiles || leader >= header.num_items) return;
  const int32_t tile = leads_tile(range);
  if (tile < 0) return;
  const int lane = threadIdx.x % 32;
  const int32_t row = blockIdx.y * kWarps + threadIdx.x / 32;
  const TileView view = view_tile(p.shape, tile_shape, plan.tiles[tile]);
  if (row >= valid_rows(p, view)) return;

  int32_t pieces = 1;
  for (int32_t w = leader + 1 + lane;; w += 32) {
    const bool joins = w < num_workers && plan.ranges[w].tile == tile && plan.ranges[w].block > 0;
    const int32_t joined = __popc(__ballot_sync(~0u, joins));
    pieces += joined;
    if (joined < 32) break;
  }
  // A later piece is the first its worker holds; only the leader's may be its last.
  const auto slot_of = [&](int32_t i) { return i ? 2 * (leader + i) : partial_slot(range, leader, tile); };

  float max = -INFINITY;
  for (int32_t i = lane; i < pieces; i += 32) max = fmaxf(max, partials.state_of(slot_of(i), row).max);
  max = warp_max(max);
  const float reference = max == -INFINITY ? 0.f : max;  // no key seen: sums of zero, not NaN

  const int32_t dim = p.shape.head_dim;
  const TileRow at = tile_row(p, view, row);
  T* out = out_row<T>(p, view, at);
  float sum = 0.f;
  for (int32_t i = lane; i < pieces; i += 32) {
    const SoftmaxState s = partials.state_of(slot_of(i), row);
    sum += s.sum * exp2f(s.max - reference);
  }
  const SoftmaxState merged{max, warp_sum(sum)};
  const float norm = merged.normalizer();
  for (int32_t first_dim = 0; first_dim < dim; first_dim += 128) {
    const int32_t d = min_of(first_dim + 4 * lane, dim - 4);  // lanes beyond the end repeat the last elements
    float4 acc{0.f, 0.f, 0.f, 0.f};
    for (int32_t first = 0; first < pieces; first += 32) {
      const float weight =
          first + lane < pieces ? exp2f(partials.state_of(slot_of(first + lane), row).max - reference) : 0.f;
      const int32_t count = min_of(pieces - first, 32);
#pragma unroll 4
      for (int32_t i = 0; i < count; ++i) {
        const float w = __shfl_sync(~0u, weight, i);
        const float4 x = *reinterpret_cast<const float4*>(partials.out_row(slot_of(first + i), row) + d);
        acc.x += w * x.x, acc.y += w * x.y, acc.z += w * x.z, acc.w += w * x.w;
      }
    }
    *reinterpret_cast<uint2*>(out + d) = {pack<T>(acc.x * norm, acc.y * norm), pack<T>(acc.z * norm, acc.w * norm)};
  }
  if (lane == 0) lse_at(p, view, at) = merged.lse();
}

}  // namespace

cudaError_t combine(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  const dim3 grid(c.num_workers, (c.tile_rows + kWarps - 1) / kWarps);
  const auto kernel = p.dtype == DType::kFloat16 ? combine_kernel<__half> : combine_kernel<__nv_bfloat16>;
  return launch(kernel, grid, 32 * kWarps, 0, stream, c.overlap, p, c.tile, w.plan, w.partials, c.num_workers);
}

}  // namespace flux::cuda
