// Block selection by mma.sync: each of eight warps has 16 rows of a tile, and all columns of a step.
#include "cuda/dependent_launch.h"
#include "cuda/select.h"
#include "cuda/sm80/fragments.h"

namespace flux::cuda::sm80 {
namespace {

constexpr int kColumns = 128, kSlots = 3, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRowTiles = kSelectRows / (16 * kWarps);
constexpr int kSlotBytes = SelectSlab::kRowBytes * (kSelectRows + kColumns);
constexpr int kSmemBytes = kSlots * kSlotBytes;  // 96 KB: what every GPU since 8.0 has

// scores += rows x columns of one slab.
template <typename T>
__device__ void multiply_slab(float (&scores)[kRowTiles][kColumns / 8][4], SelectSlab rows, SelectSlab columns) {
  const int first_row = threadIdx.x / 32 * 16 * kRowTiles;
#pragma unroll
  for (int k = 0; k < kSelectInner / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) rows.left(a[m], first_row + 16 * m, 2 * k);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[4];
      columns.right(b, 16 * n, 2 * k);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<T>(scores[m][2 * n], a[m], b[0], b[1]);
        mma<T>(scores[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// One pass over a tile: the sums of its rows, then their part of the masses.
template <typename T>
__device__ void run_pass(const SelectKernelParams& k, const SelectTile& t, int32_t pass, const SelectScratch& scratch,
                         SelectRowStates& states) {
  const SelectParams& p = k.select;
  const SelectLoader<T, kThreads> loader(k, t, pass, threadIdx.x);
  const int32_t slabs = p.stride * p.head_dim / kSelectInner, steps = ceil_div(t.columns, kColumns);
  const uint32_t base = shared_address(shared_memory());
  const auto rows_of = [&](int32_t i) { return SelectSlab{base + i % kSlots * kSlotBytes}; };
  const auto columns_of = [&](int32_t i) {
    return SelectSlab{base + i % kSlots * kSlotBytes + kSelectRows * SelectSlab::kRowBytes};
  };
  const auto load = [&](int32_t i) {  // always one group
    if (i < steps * slabs) loader.template load<kColumns>(rows_of(i), columns_of(i), i / slabs * kColumns, i % slabs);
    cp_async_commit();
  };
  for (int i = 0; i < kSlots - 1; ++i) load(i);

  OnlineSoftmax<2 * kRowTiles> softmax;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * kRowTiles + lane / 4;
  const auto row_of = [&](int r) { return first + r / 2 * 16 + r % 2 * 8; };
  for (int32_t step = 0; step < steps; ++step) {
    float scores[kRowTiles][kColumns / 8][4] = {};
    for (int32_t slab = 0; slab < slabs; ++slab) {
      const int32_t i = step * slabs + slab;
      cp_async_wait<kSlots - 2>();
      __syncthreads();
      load(i + kSlots - 1);
      multiply_slab<T>(scores, rows_of(i), columns_of(i));
    }
    const int32_t c = p.columns_per_block();
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r)
      absorb_row<kColumns / 8>(
          softmax, r, [&](int j, int i) -> float& { return scores[r / 2][j][r % 2 * 2 + i]; }, p.log2_scale(),
          t.seen(k, pass, row_of(r)) - step * kColumns, c,
          scratch.sums + int64_t(row_of(r)) * k.tiling.sums_stride + step * (kColumns / c),
          scratch.maxima + int64_t(step) * kSelectRows + row_of(r));
  }
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    const SoftmaxState state = softmax.state(r, 1.f);
    states.max[row_of(r)] = state.max;
    states.factor[row_of(r)] = t.seen(k, pass, row_of(r)) > 0 ? 1.f / state.sum : 0.f;
  }
  cp_async_wait<0>();
  __syncthreads();
  add_masses<kThreads, kColumns>(k, t, pass, scratch, states, threadIdx.x, [] { __syncthreads(); });
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ SelectKernelParams k) {
  __shared__ SelectRowStates states;
  __shared__ int32_t next;
  const SelectScratch scratch(k);
  for (int32_t item = blockIdx.x; item < k.items;) {
    const SelectTile t(k, item);
    if (t.columns > 0)
      for (int32_t pass = 0; pass < k.tiling.passes; ++pass) run_pass<T>(k, t, pass, scratch, states);
    write_lists<kThreads>(k, t, scratch, threadIdx.x);
    if (threadIdx.x == 0) next = int32_t(gridDim.x) + atomicAdd(k.next_item, 1);
    __syncthreads();
    item = next;
    __syncthreads();
  }
}

auto kernel_of(const SelectParams& p) {
  return p.dtype == DType::kFloat16 ? select_kernel<__half> : select_kernel<__nv_bfloat16>;
}

int most_blocks(const SelectParams& p, const Device& device) {
  int blocks = 0;
  const auto kernel = kernel_of(p);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, kSmemBytes) != cudaSuccess)
    return 0;
  return blocks * device.num_sms;
}

cudaError_t launch_select(const SelectKernelParams& k, int32_t blocks, cudaStream_t stream) {
  if (cudaError_t e = cudaMemsetAsync(k.next_item, 0, sizeof(int32_t), stream)) return e;
  return launch(kernel_of(k.select), dim3(blocks), kThreads, kSmemBytes, stream, false, k);
}

}  // namespace

const SelectInstance kSelect = {kColumns, 1, [](const SelectParams&) { return true; }, most_blocks, launch_select};

}  // namespace flux::cuda::sm80
