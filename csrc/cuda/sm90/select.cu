// Block selection on Hopper: a producer warpgroup loads slabs of queries and keys, two consumer warpgroups multiply
// them by WGMMA, 64 rows each, and turn the scores of a step into sums while the next step's slabs arrive.
//
// kSelectByTma loads by TMA. What bounds it is how much the L2 cache gives, so two thread blocks, with neighbouring
// tiles, go through the columns together: each loads half of a slab's columns, into the shared memory of both. kSelect,
// for pages and shapes that are no boxes, loads by cp.async.
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/dependent_launch.h"
#include "cuda/select.h"
#include "cuda/sm90/mainloop.h"
#include "cuda/sm90/tensor_map.h"

namespace flux::cuda::sm90 {
namespace {

template <bool kTma>
struct SelectCall {
  SelectKernelParams k;
};
// A row of a slab is every stride-th token, so tokens are two dimensions: within a stride, and strides. What lies
// beyond the last whole stride of the tensor is in no box.
template <>
struct SelectCall<true> {
  CUtensorMap q_map;  // {D, Hq, stride, S / stride, B} in boxes {64, group, 1, rows of a tile}
  CUtensorMap k_map;  // {D, stride, S / stride, Hkv, B} in boxes {64, 1, 64}
  SelectKernelParams k;
};

template <class Element_, bool kTma_>
struct SelectTraits {
  using Element = Element_;
  using PackedElement = std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;
  static constexpr bool kTma = kTma_;
  // cp.async needs registers for addresses, so there a step has fewer columns.
  static constexpr int kColumns = kTma ? 256 : 192;
  static constexpr int kBox = 64;  // columns that are loaded at a time, and what a last step is rounded up to
  static constexpr int kCluster = kTma ? 2 : 1, kMathThreads = 256, kThreads = 128 + kMathThreads;
  static constexpr int kSlots = 4;  // slabs in shared memory
  static constexpr int kItems = 2;
  // Of 168 registers for each thread of the launch.
  static constexpr int kProducerRegs = kTma ? 56 : 136, kMathRegs = kTma ? 224 : 184;

  using Atom = cute::GMMA::Layout_K_SW128_Atom<Element>;
  static constexpr int kRowElements = kSelectRows * kSelectInner, kColumnElements = kColumns * kSelectInner;
  using LayoutRows = decltype(tile_to_shape(Atom{}, Shape<Int<kSelectRows>, Int<kSelectInner>, Int<kSlots>>{}));
  // Of the first kUsed columns of a slab.
  template <int kUsed>
  using LayoutColumns = decltype(tile_to_shape(Atom{}, Shape<Int<kUsed>, Int<kSelectInner>>{}));
  template <int kUsed>
  using Mma = decltype(make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, Shape<Int<kSelectRows>, Int<kUsed>, Int<kSelectInner>>,
                                 Major::K, Major::K>(),
      Layout<Shape<_2, _1, _1>>{}));
  // A thread's scores: value[4 * j + 2 * r + c], see thread_rows.h.
  template <int kUsed>
  using LayoutScores = Layout<Shape<Shape<_2, _2, Int<kUsed / 8>>, _1, _1>>;

  struct Shared {
    alignas(1024) Element rows[kSlots * kRowElements];
    alignas(1024) Element columns[kSlots * kColumnElements];
    SelectRowStates states;
    int32_t item[kItems];  // negative: no more
    Barrier full[kSlots], empty[kSlots];
    Barrier item_full[kItems], item_empty[kItems];
  };
  static_assert(sizeof(Shared) <= kSharedCapacity);
};

// ---- items ----

// Of clusters: dealt out in turn, back and forth, as they come longest first. Both blocks find the same.
struct DealtItems {
  int32_t round = 0;
  CUTLASS_DEVICE int32_t next(const SelectKernelParams& k) {
    const int32_t clusters = int32_t(gridDim.x) / 2, mine = int32_t(blockIdx.x) / 2;
    const int32_t item = round * clusters + (round % 2 ? clusters - 1 - mine : mine);
    ++round;
    return item < k.items ? item : -1;
  }
};

// Of lone blocks: handed out by the producer as they finish.
template <class T>
struct SharedItems {
  Ring<T::kItems> ring;
  CUTLASS_DEVICE int32_t next(typename T::Shared& shared) {
    shared.item_full[ring.index].wait(ring.phase);
    const int32_t item = shared.item[ring.index];
    shared.item_empty[ring.index].arrive();
    ring.advance();
    return item;
  }
};

// ---- producers ----

// By TMA; one thread.
template <class T>
CUTLASS_DEVICE void produce_by_tma(const SelectCall<true>& call, typename T::Shared& shared, int32_t rank) {
  const SelectKernelParams& k = call.k;
  const SelectParams& p = k.select;
  const int32_t slabs_of_token = p.head_dim / kSelectInner, slabs = p.stride * slabs_of_token;
  constexpr auto kHint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr uint32_t kBytes = sizeof(typename T::Element);
  Ring<T::kSlots> ring;
  DealtItems items;
  for (int32_t item = items.next(k); item >= 0; item = items.next(k)) {
    const SelectTile t(k, item, rank);
    const int32_t q_seq = p.q.stride.b == 0 ? 0 : t.at.seq, k_seq = p.kv.k.stride.b == 0 ? 0 : t.at.seq;
    const int32_t first_query = t.view.q_rows.begin + t.first_row * p.stride + p.stride - 1;
    for (int32_t first = 0; first < t.columns; first += T::kColumns) {
      const int32_t first_key = t.view.kv_rows.begin + first * p.stride, left = t.columns - first;
      const int32_t boxes = min_of(ceil_div(left, T::kBox), T::kColumns / T::kBox);  // the blocks load them in turn
      const uint32_t bytes = kBytes * (T::kRowElements + uint32_t(boxes) * (T::kBox * kSelectInner));
      for (int32_t slab = 0; slab < slabs; ++slab) {
        const int32_t token = slab / slabs_of_token, within = (slab - token * slabs_of_token) * kSelectInner;
        const int32_t query = first_query - token, key = first_key + token;
        Barrier& full = shared.full[ring.index];
        shared.empty[ring.index].wait(ring.phase ^ 1);
        full.arrive_and_expect(bytes);
        cute::SM90_TMA_LOAD_5D::copy(&call.q_map, full.pointer(), kHint, shared.rows + ring.index * T::kRowElements,
                                     within, t.at.kv_head * p.group(), query % p.stride, query / p.stride, q_seq);
        CUTE_UNROLL
        for (int32_t i = 0; i < T::kColumns / T::kBox; i += 2) {
          const int32_t box = i + rank;
          if (box < boxes)
            cute::SM90_TMA_LOAD_MULTICAST_5D::copy(
                &call.k_map, full.pointer(), uint16_t(3), kHint,
                shared.columns + ring.index * T::kColumnElements + box * (T::kBox * kSelectInner), within,
                key % p.stride, key / p.stride + box * T::kBox, t.at.kv_head, k_seq);
        }
        ring.advance();
      }
    }
  }
}

// By cp.async; a warpgroup. Hands out the items, too.
template <class T>
CUTLASS_DEVICE void produce_by_copies(const SelectKernelParams& k, typename T::Shared& shared) {
  constexpr int kRowsBytes = 2 * T::kRowElements, kColumnsBytes = 2 * T::kColumnElements;
  const uint32_t rows = sm80::shared_address(shared.rows), columns = sm80::shared_address(shared.columns);
  const int thread = threadIdx.x;
  const int32_t slabs = k.select.stride * k.select.head_dim / kSelectInner;
  Ring<T::kSlots> ring, loaded;
  SharedItems<T> items;
  int under_way = 0;
  constexpr int kInFlight = 2;  // slabs that load while an earlier one is handed over
  const auto hand_over = [&] {  // the oldest slab, of which all loads of this thread are done
    cutlass::arch::fence_view_async_shared();
    shared.full[loaded.index].arrive();
    loaded.advance();
  };
  const auto hand_over_all = [&] {
    sm80::cp_async_wait<0>();
    for (; under_way > 0; --under_way) hand_over();
  };
  for (int32_t next = blockIdx.x;;) {
    if (thread == 0) {
      shared.item_empty[items.ring.index].wait(items.ring.phase ^ 1);
      shared.item[items.ring.index] = next < k.items ? next : -1;
      shared.item_full[items.ring.index].arrive();
      if (next < k.items) next = int32_t(gridDim.x) + atomicAdd(k.next_item, 1);
    }
    const int32_t item = items.next(shared);
    if (item < 0) break;
    const SelectTile t(k, item);
    // Loads of an item hand over the last slabs of the one before. This one has none, and the next but one may wait for
    // the consumers to be done with them.
    if (t.columns == 0) hand_over_all();
    for (int32_t pass = 0; t.columns > 0 && pass < k.tiling.passes; ++pass) {
      const SelectLoader<typename T::PackedElement, 128> loader(k, t, pass, thread);
      for (int32_t first = 0; first < t.columns; first += T::kColumns)
        for (int32_t slab = 0; slab < slabs; ++slab) {
          shared.empty[ring.index].wait(ring.phase ^ 1);
          loader.template load<T::kColumns>(SelectSlab{rows + ring.index * kRowsBytes},
                                            SelectSlab{columns + ring.index * kColumnsBytes}, first, slab);
          sm80::cp_async_commit();
          ring.advance();
          if (under_way == kInFlight) {
            sm80::cp_async_wait<kInFlight>();
            hand_over();
          } else {
            ++under_way;
          }
        }
    }
  }
  hand_over_all();
}

// ---- consumers ----

template <class T>
class SelectConsumer {
 public:
  CUTLASS_DEVICE SelectConsumer(const SelectKernelParams& k, typename T::Shared& shared, int32_t rank)
      : k_(k), shared_(shared), rank_(rank), thread_(threadIdx.x - 128) {}

  CUTLASS_DEVICE void run() {
    const SelectScratch scratch(k_);
    DealtItems dealt;
    SharedItems<T> handed_out;
    for (;;) {
      const int32_t item = T::kTma ? dealt.next(k_) : handed_out.next(shared_);
      if (item < 0) return;
      const SelectTile t(k_, item, rank_);
      for (int32_t pass = 0; t.columns > 0 && pass < k_.tiling.passes; ++pass) run_pass(t, pass, scratch);
      write_lists<T::kMathThreads>(k_, t, scratch, thread_);
      sync();
    }
  }

 private:
  static CUTLASS_DEVICE void sync() { cutlass::arch::NamedBarrier::sync(T::kMathThreads, 0); }

  CUTLASS_DEVICE void run_pass(const SelectTile& t, int32_t pass, const SelectScratch& scratch) {
    const SelectParams& p = k_.select;
    const int32_t c = p.columns_per_block(), warpgroup = thread_ / 128;
    OnlineSoftmax<kThreadRows> softmax;
    cute::Tensor s = cute::make_tensor<float>(typename T::template LayoutScores<T::kColumns>{});
    int32_t seen[kThreadRows], row[kThreadRows];
    for (int r = 0; r < kThreadRows; ++r) {
      row[r] = thread_row(warpgroup, r);
      seen[r] = t.seen(k_, pass, row[r]);
    }
    for (int32_t first = 0, step = 0; first < t.columns; first += T::kColumns, ++step) {
      cute::clear(s);  // also says that no score has to be kept from before
      const int32_t used = t.columns - first;
      if (!T::kTma || used > 192)
        multiply<T::kColumns>(s, t, first);
      else if (used > 128)
        multiply<192>(s, t, first);
      else if (used > 64)
        multiply<128>(s, t, first);
      else
        multiply<64>(s, t, first);
      CUTE_UNROLL
      for (int r = 0; r < kThreadRows; ++r)
        absorb_row<T::kColumns / 8>(
            softmax, r, [&](int j, int i) -> float& { return s(4 * j + 2 * r + i); }, p.log2_scale(), seen[r] - first,
            c, scratch.sums + int64_t(row[r]) * k_.tiling.sums_stride + first / c,
            scratch.maxima + int64_t(step) * kSelectRows + row[r]);
    }
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const SoftmaxState state = softmax.state(r, 1.f);
      shared_.states.max[row[r]] = state.max;
      shared_.states.factor[row[r]] = seen[r] > 0 ? 1.f / state.sum : 0.f;
    }
    sync();
    add_masses<T::kMathThreads, T::kColumns>(k_, t, pass, scratch, shared_.states, thread_, sync);
    sync();
  }

  // s += rows x the first kUsed columns of all slabs of a step.
  template <int kUsed, class Scores>
  CUTLASS_DEVICE void multiply(Scores& s, const SelectTile& t, int32_t first_column) {
    using namespace cute;
    typename T::template Mma<kUsed> mma;
    const auto slice = mma.get_slice(thread_);
    const Tensor rows = slice.partition_fragment_A(make_tensor(make_smem_ptr(shared_.rows), typename T::LayoutRows{}));
    Tensor scores = make_tensor(s.data(), typename T::template LayoutScores<kUsed>{});
    const int32_t slabs = k_.select.stride * k_.select.head_dim / kSelectInner;
    const Span odd_rows = T::kTma ? rows_in_no_box(t) : Span{0, 0};
    const Span odd_columns = T::kTma ? columns_in_no_box(t, first_column) : Span{0, 0};
    int before = -1;  // the slot of the slab before
    for (int32_t slab = 0; slab < slabs; ++slab) {
      const int slot = ring_.index;
      shared_.full[slot].wait(ring_.phase);
      ring_.advance();
      if (odd_rows.size() + odd_columns.size() > 0) fill_in(t, odd_rows, odd_columns, first_column, slab, slot);
      const Tensor columns = slice.partition_fragment_B(make_tensor(
          make_smem_ptr(shared_.columns + slot * T::kColumnElements), typename T::template LayoutColumns<kUsed>{}));
      issue(mma, rows(_, _, _, slot), columns, scores, GMMA::ScaleOut::One);
      if (before >= 0) {
        warpgroup_wait<1>();
        release(before);
      }
      before = slot;
    }
    finish<0>(scores);
    release(before);
  }

  CUTLASS_DEVICE void release(int slot) {
    if constexpr (!T::kTma) {
      shared_.empty[slot].arrive();
    } else {  // to both blocks, which load into both
      __syncwarp();
      if (threadIdx.x % 32 < 2) shared_.empty[slot].arrive_at(threadIdx.x % 32);
    }
  }

  // ---- what TMA leaves out ----

  // Of the rows (or columns) of a sequence with these tokens the last ones, which reach past its end, or past the last
  // whole stride of a tensor of so many tokens.
  CUTLASS_DEVICE Span in_no_box(const Span& tokens, int32_t capacity) const {
    const int32_t stride = k_.select.stride, end = min_of(tokens.end, capacity / stride * stride);
    return {max_of(end - tokens.begin, 0) / stride, ceil_div(tokens.size(), stride)};
  }
  CUTLASS_DEVICE static Span within(const Span& x, int32_t begin, int32_t count) {
    const int32_t lo = max_of(x.begin - begin, 0), hi = min_of(x.end - begin, count);
    return {lo, max_of(hi, lo)};
  }
  CUTLASS_DEVICE Span rows_in_no_box(const SelectTile& t) const {
    return within(in_no_box(t.view.q_rows, k_.select.q.rows.capacity), t.first_row, kSelectRows / k_.select.group());
  }
  CUTLASS_DEVICE Span columns_in_no_box(const SelectTile& t, int32_t first_column) const {
    return within(in_no_box(t.view.kv_rows, k_.select.kv.rows.capacity), first_column, T::kColumns);
  }

  // Writes them into a slab, with zeros past the end of the sequence. There are at most two of each.
  CUTLASS_DEVICE void fill_in(const SelectTile& t, const Span& rows, const Span& columns, int32_t first_column,
                              int32_t slab, int slot) {
    const SelectParams& p = k_.select;
    const int32_t token = slab * kSelectInner / p.head_dim, first = slab * kSelectInner % p.head_dim;
    const int32_t group = p.group(), chunk = thread_ % 8;
    auto* const row_memory = reinterpret_cast<char*>(shared_.rows + slot * T::kRowElements);
    auto* const column_memory = reinterpret_cast<char*>(shared_.columns + slot * T::kColumnElements);
    const auto copy = [&](char* to, const void* data, int64_t offset, bool exists) {
      const auto* from = reinterpret_cast<const uint4*>(static_cast<const typename T::Element*>(data) + offset);
      *reinterpret_cast<uint4*>(to) = exists ? *from : uint4{0, 0, 0, 0};
    };
    for (int32_t i = rows.begin * group + thread_ / 8; i < rows.end * group; i += T::kMathThreads / 8) {
      const int32_t query = (t.first_row + i / group) * p.stride + p.stride - 1 - token;
      copy(row_memory + SelectSlab::offset(i, chunk), p.q.data,
           t.at.seq * p.q.stride.b + int64_t(t.view.q_rows.begin + query) * p.q.stride.s +
               (t.at.kv_head * group + i % group) * p.q.stride.h + first + chunk * 8,
           query < t.view.q_rows.size());
    }
    for (int32_t i = columns.begin + thread_ / 8; i < columns.end; i += T::kMathThreads / 8) {
      const int32_t key = (first_column + i) * p.stride + token;
      copy(column_memory + SelectSlab::offset(i, chunk), p.kv.k.data,
           t.at.seq * p.kv.k.stride.b + int64_t(t.view.kv_rows.begin + key) * p.kv.k.stride.s +
               t.at.kv_head * p.kv.k.stride.h + first + chunk * 8,
           key < t.view.kv_rows.size());
    }
    cutlass::arch::fence_view_async_shared();
    sync();
  }

  const SelectKernelParams& k_;
  typename T::Shared& shared_;
  const int32_t rank_;
  const int thread_;
  Ring<T::kSlots> ring_;
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) select_kernel(const __grid_constant__ SelectCall<T::kTma> call) {
  extern __shared__ __align__(1024) char raw[];
  auto& shared = *reinterpret_cast<typename T::Shared*>(raw);
  if (threadIdx.x == 0) {
    const uint32_t loaders = T::kTma ? 1 : 128,
                   consumers = T::kTma ? T::kCluster * T::kMathThreads / 32 : T::kMathThreads;
    for (int i = 0; i < T::kSlots; ++i) shared.full[i].init(loaders), shared.empty[i].init(consumers);
    for (int i = 0; i < T::kItems; ++i) shared.item_full[i].init(1), shared.item_empty[i].init(T::kThreads);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  int32_t rank = 0;
  if constexpr (T::kTma) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
    rank = int32_t(cute::block_rank_in_cluster());
    wait_for_previous();
    let_next_start();
  }
  if (threadIdx.x < 128) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegs>();
    if constexpr (T::kTma) {
      if (threadIdx.x < 32 && cute::elect_one_sync()) produce_by_tma<T>(call, shared, rank);
      __syncwarp();
    } else {
      produce_by_copies<T>(call.k, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kMathRegs>();
    SelectConsumer<T>(call.k, shared, rank).run();
  }
  if constexpr (T::kTma) {  // the other block may still load into this one, and release its slots
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }
}

// ---- launch ----

template <bool kTma>
auto kernel_of(DType dtype) {
  return dtype == DType::kFloat16 ? select_kernel<SelectTraits<cutlass::half_t, kTma>>
                                  : select_kernel<SelectTraits<cutlass::bfloat16_t, kTma>>;
}

// By TMA: clusters, which may start before the previous kernel has ended (dependent_launch.h).
template <bool kTma>
cudaLaunchConfig_t config_of(int32_t blocks, cudaStream_t stream, cudaLaunchAttribute (&attributes)[2]) {
  using T = SelectTraits<cutlass::half_t, kTma>;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {T::kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = sizeof(typename T::Shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kTma ? 2 : 1;
  return config;
}

template <bool kTma>
int most_blocks(const SelectParams& p, const Device&) {
  const auto kernel = kernel_of<kTma>(p.dtype);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = config_of<kTma>(2, nullptr, attributes);
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamicSmemBytes)) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess)
    return 0;
  return clusters * int(attributes[0].val.clusterDim.x);
}

// Dimensions of whole strides; see SelectCall.
TensorShape<5> q_shape(const SelectParams& p) {
  const Strides& s = p.q.stride;
  return {p.q.data,
          {p.head_dim, p.q.num_heads, p.stride, p.q.rows.capacity / p.stride, s.b == 0 ? 1 : p.batch},
          {1, s.h, s.s, s.s * p.stride, s.b}};
}
TensorShape<5> k_shape(const SelectParams& p) {
  const Strides& s = p.kv.k.stride;
  return {p.kv.k.data,
          {p.head_dim, p.stride, p.kv.rows.capacity / p.stride, p.kv.num_heads, s.b == 0 ? 1 : p.batch},
          {1, s.s, s.s * p.stride, s.h, s.b}};
}

bool fits_tma(const SelectParams& p) {
  const int32_t block_rows = p.rows_per_block() * p.group();
  return !p.kv.page_table && p.head_dim % kSelectInner == 0 && kSelectRows % block_rows == 0 &&
         q_shape(p).describable() && k_shape(p).describable();
}

cudaError_t launch_by_tma(const SelectKernelParams& k, int32_t blocks, cudaStream_t stream) {
  using T = SelectTraits<cutlass::half_t, true>;
  const SelectParams& p = k.select;
  SelectCall<true> call{{}, {}, k};
  const int32_t group = p.group();
  if (cudaError_t e = encode(q_shape(p), p.dtype, {kSelectInner, group, 1, kSelectRows / group}, &call.q_map)) return e;
  if (cudaError_t e = encode(k_shape(p), p.dtype, {kSelectInner, 1, T::kBox}, &call.k_map)) return e;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = config_of<true>(blocks, stream, attributes);
  return cudaLaunchKernelEx(&config, kernel_of<true>(p.dtype), call);
}

cudaError_t launch_by_copies(const SelectKernelParams& k, int32_t blocks, cudaStream_t stream) {
  if (cudaError_t e = cudaMemsetAsync(k.next_item, 0, sizeof(int32_t), stream)) return e;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = config_of<false>(blocks, stream, attributes);
  return cudaLaunchKernelEx(&config, kernel_of<false>(k.select.dtype), SelectCall<false>{k});
}

}  // namespace

const SelectInstance kSelectByTma = {SelectTraits<cutlass::half_t, true>::kColumns, 2, fits_tma, most_blocks<true>,
                                     launch_by_tma};
const SelectInstance kSelect = {SelectTraits<cutlass::half_t, false>::kColumns, 1,
                                [](const SelectParams&) { return true; }, most_blocks<false>, launch_by_copies};

}  // namespace flux::cuda::sm90
