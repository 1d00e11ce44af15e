// Block selection on Hopper: a producer warpgroup loads slabs of queries and keys, two consumer warpgroups multiply them
// by WGMMA, 64 rows each, and turn the scores of a step into sums while the next step's slabs arrive.
//
// Slabs are loaded by cp.async, not by TMA: rows of `stride` tokens in reverse, pages, sequences that begin anywhere and
// end within a stride are then all the same.
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/dependent_launch.h"
#include "cuda/select.h"
#include "cuda/sm90/mainloop.h"

namespace flux::cuda::sm90 {
namespace {

template <class Element_>
struct SelectTraits {
  using Element = Element_;
  using PackedElement = std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
  static constexpr int kColumns = 256, kMathThreads = 256, kThreads = 128 + kMathThreads;
  static constexpr int kSlots = 4;  // slabs in shared memory
  static constexpr int kInFlight = 2;  // slabs that load while an earlier one is handed over
  static constexpr int kItems = 2;
  // Of 168 registers for each thread of the launch.
  static constexpr int kProducerRegs = 104, kMathRegs = 200;

  using Atom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  using LayoutRows = decltype(tile_to_shape(Atom{}, Shape<Int<kSelectRows>, Int<kSelectInner>, Int<kSlots>>{}));
  using LayoutColumns = decltype(tile_to_shape(Atom{}, Shape<Int<kColumns>, Int<kSelectInner>, Int<kSlots>>{}));
  using Mma = decltype(make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, Shape<Int<kSelectRows>, Int<kColumns>, Int<kSelectInner>>,
                                 Major::K, Major::K>(),
      Layout<Shape<_2, _1, _1>>{}));
  static_assert(cute::size<1>(typename Mma::AtomShape_MNK{}) == kColumns, "one instruction for all columns of a step");

  struct Shared {
    alignas(1024) Element rows[kSlots * kSelectRows * kSelectInner];
    alignas(1024) Element columns[kSlots * kColumns * kSelectInner];
    SelectRowStates states;
    int32_t item[kItems];  // negative: no more
    Barrier full[kSlots], empty[kSlots];
    Barrier item_full[kItems], item_empty[kItems];
  };
  static_assert(sizeof(Shared) <= kSharedCapacity);
};

// Hands out tiles, and loads their slabs in the order in which they are multiplied.
template <class T>
CUTLASS_DEVICE void produce(const SelectKernelParams& k, typename T::Shared& shared) {
  constexpr int kRowsBytes = 2 * kSelectRows * kSelectInner, kColumnsBytes = 2 * T::kColumns * kSelectInner;
  const uint32_t rows = sm80::shared_address(shared.rows), columns = sm80::shared_address(shared.columns);
  const int thread = threadIdx.x;
  const int32_t slabs = k.select.stride * k.select.head_dim / kSelectInner;
  Ring<T::kSlots> ring, loaded;
  Ring<T::kItems> items;
  int under_way = 0;
  const auto hand_over = [&] {  // the oldest slab, of which all loads of this thread are done
    cutlass::arch::fence_view_async_shared();
    shared.full[loaded.index].arrive();
    loaded.advance();
  };
  for (int64_t item = blockIdx.x;;) {
    if (thread == 0) {
      shared.item_empty[items.index].wait(items.phase ^ 1);
      shared.item[items.index] = item < k.items ? int32_t(item) : -1;
      shared.item_full[items.index].arrive();
      if (item < k.items) item = int64_t(gridDim.x) + atomicAdd(k.next_item, 1);
    }
    shared.item_full[items.index].wait(items.phase);
    const int32_t mine = shared.item[items.index];
    shared.item_empty[items.index].arrive();
    items.advance();
    if (mine < 0) break;
    const SelectTile t(k, mine);
    for (int32_t pass = 0; t.columns > 0 && pass < k.tiling.passes; ++pass) {
      const SelectLoader<typename T::PackedElement, 128> loader(k, t, pass, thread);
      for (int32_t first = 0; first < t.columns; first += T::kColumns)
        for (int32_t slab = 0; slab < slabs; ++slab) {
          shared.empty[ring.index].wait(ring.phase ^ 1);
          loader.template load<T::kColumns>(SelectSlab{rows + ring.index * kRowsBytes},
                                            SelectSlab{columns + ring.index * kColumnsBytes}, first, slab);
          sm80::cp_async_commit();
          ring.advance();
          if (under_way == T::kInFlight) {
            sm80::cp_async_wait<T::kInFlight>();
            hand_over();
          } else {
            ++under_way;
          }
        }
    }
  }
  sm80::cp_async_wait<0>();
  for (; under_way > 0; --under_way) hand_over();
}

template <class T>
CUTLASS_DEVICE void consume(const SelectKernelParams& k, typename T::Shared& shared) {
  using namespace cute;
  const SelectParams& p = k.select;
  const int thread = threadIdx.x - 128, warpgroup = thread / 128;
  const auto sync = [] { cutlass::arch::NamedBarrier::sync(T::kMathThreads, 0); };
  typename T::Mma mma;
  const auto slice = mma.get_slice(thread);
  const Tensor rows = slice.partition_fragment_A(make_tensor(make_smem_ptr(shared.rows), typename T::LayoutRows{}));
  const Tensor columns =
      slice.partition_fragment_B(make_tensor(make_smem_ptr(shared.columns), typename T::LayoutColumns{}));
  Tensor s = partition_fragment_C(mma, Shape<Int<kSelectRows>, Int<T::kColumns>>{});
  const SelectScratch scratch(k);
  const int32_t slabs = p.stride * p.head_dim / kSelectInner, c = p.columns_per_block();
  Ring<T::kSlots> ring;
  Ring<T::kItems> items;
  for (;;) {
    shared.item_full[items.index].wait(items.phase);
    const int32_t item = shared.item[items.index];
    shared.item_empty[items.index].arrive();
    items.advance();
    if (item < 0) return;
    const SelectTile t(k, item);
    for (int32_t pass = 0; t.columns > 0 && pass < k.tiling.passes; ++pass) {
      OnlineSoftmax<kThreadRows> softmax;
      int32_t seen[kThreadRows];
      for (int r = 0; r < kThreadRows; ++r) seen[r] = t.seen(k, pass, thread_row(warpgroup, r));
      const int32_t steps = ceil_div(t.columns, T::kColumns);
      for (int32_t step = 0; step < steps; ++step) {
        clear(s);
        int before = 0;  // the slot of the slab before
        for (int32_t slab = 0; slab < slabs; ++slab) {
          const int slot = ring.index;
          shared.full[slot].wait(ring.phase);
          ring.advance();
          issue(mma, rows(_, _, _, slot), columns(_, _, _, slot), s, GMMA::ScaleOut::One);
          if (slab > 0) {
            warpgroup_wait<1>();
            shared.empty[before].arrive();
          }
          before = slot;
        }
        finish<0>(s);
        shared.empty[before].arrive();
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r)
          absorb_row<T::kColumns / 8>(
              softmax, r, [&](int j, int i) -> float& { return s(4 * j + 2 * r + i); }, p.log2_scale(),
              seen[r] - step * T::kColumns, c,
              scratch.sums + int64_t(thread_row(warpgroup, r)) * k.tiling.sums_stride + step * (T::kColumns / c),
              scratch.maxima + int64_t(step) * kSelectRows + thread_row(warpgroup, r));
      }
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r) {
        const SoftmaxState state = softmax.state(r, 1.f);
        shared.states.max[thread_row(warpgroup, r)] = state.max;
        shared.states.factor[thread_row(warpgroup, r)] = seen[r] > 0 ? 1.f / state.sum : 0.f;
      }
      sync();
      add_masses<T::kMathThreads, T::kColumns>(k, t, pass, scratch, shared.states, thread, sync);
      sync();
    }
    write_lists<T::kMathThreads>(k, t, scratch, thread);
    sync();
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) select_kernel(const __grid_constant__ SelectKernelParams k) {
  extern __shared__ __align__(1024) char raw[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kSlots; ++i) shared.full[i].init(128), shared.empty[i].init(T::kMathThreads);
    for (int i = 0; i < T::kItems; ++i) shared.item_full[i].init(1), shared.item_empty[i].init(T::kThreads);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegs>();
    produce<T>(k, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kMathRegs>();
    consume<T>(k, shared);
  }
}

template <class T>
int blocks_that_fit() {
  return cudaFuncSetAttribute(select_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              int(sizeof(typename T::Shared))) == cudaSuccess;
}

int blocks_per_multiprocessor(DType dtype) {
  return dtype == DType::kFloat16 ? blocks_that_fit<SelectTraits<cutlass::half_t>>()
                                  : blocks_that_fit<SelectTraits<cutlass::bfloat16_t>>();
}

template <class T>
cudaError_t launch_select(const SelectKernelParams& k, int32_t blocks, cudaStream_t stream) {
  return launch(select_kernel<T>, dim3(blocks), T::kThreads, int(sizeof(typename T::Shared)), stream, false, k);
}

cudaError_t launch_by_dtype(const SelectKernelParams& k, int32_t blocks, cudaStream_t stream) {
  return k.select.dtype == DType::kFloat16 ? launch_select<SelectTraits<cutlass::half_t>>(k, blocks, stream)
                                           : launch_select<SelectTraits<cutlass::bfloat16_t>>(k, blocks, stream);
}

}  // namespace

const SelectInstance kSelect = {SelectTraits<cutlass::half_t>::kColumns, blocks_per_multiprocessor, launch_by_dtype};

}  // namespace flux::cuda::sm90
