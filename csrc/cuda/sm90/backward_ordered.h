// All gradients of full attention on Hopper by one kernel, which computes S and dP once: as the kernel of the keys
// (backward_keys.h), and each block of keys also adds its part of dQ, dS K, to sums in fp32 in global memory, in a
// fixed order (core/add_order.h). A kernel before it finds lse and delta of the rows, one after it writes dQ. Sequence
// heads with another pattern are left to the two kernels of the rows and keys.
//
// dS goes through shared memory, as both warpgroups' keys count in each row of dQ: a warpgroup finds half of the
// columns, of all keys. The sums lie in memory as the threads' accumulators hold them, so a thread adds 16 bytes at a
// time.
#pragma once

#include "core/add_order.h"
#include "cuda/sm90/launch_backward.h"

namespace flux::cuda::sm90 {

constexpr int kOrderedLoadThreads = 64;

// What the warpgroups that multiply give each other, and the warps that keep the order.
template <class Element>
struct OrderedExchange {
  static constexpr int kTurns = 4;  // so many steps may be between a turn's begin and the next block's
  alignas(1024) Element ds[2][kAddedKeys * kTileRows];  // [keys][rows], swizzled
  Barrier turn[kTurns];                                 // the block may add to the tile,
  Barrier added[kTurns];                                // has added to it,
  Barrier passed[kTurns];                               // and the next block knows

  CUTLASS_DEVICE void init() {
    for (int i = 0; i < kTurns; ++i) turn[i].init(1), added[i].init(256), passed[i].init(1);
  }
};

// The sums of dQ and the tickets, which say how many blocks have added to a tile.
struct TileSums {
  static constexpr int kVectors = 8;  // float4 of a thread
  float4* sums;                       // [tiles, 2 warpgroups, kVectors, 128 threads]
  uint32_t* tickets;                  // [tiles]

  CUTLASS_DEVICE TileSums(const BackwardWorkspace& w, const AttendParams& p, const Tile& of) {
    const int64_t first = int64_t(of.seq * p.kv.num_heads + of.kv_head) * w.tiles_each;
    sums = reinterpret_cast<float4*>(w.dq) + first * 2 * kVectors * 128;
    tickets = w.tickets + first;
  }
  CUTLASS_DEVICE float4* of_thread(int32_t tile, int warpgroup) const {
    return sums + int64_t(tile * 2 + warpgroup) * kVectors * 128 + threadIdx.x % 128;
  }
};

CUTLASS_DEVICE void add_to_global(float4* to, float x, float y, float z, float w) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}
CUTLASS_DEVICE uint32_t load_acquire(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
CUTLASS_DEVICE void store_release(uint32_t* to, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// Of hard routes: heads with full attention. A mixture's: see mix_ordered.h.
struct OrderedWalks : HardWalks {
  using Info = VisitedRows<kTileRows>;
  // Are there registers to keep where in shared memory dS goes?
  static constexpr bool kKeepsPlaces = true;
  static __device__ const BackwardWorkspace& sums(const BackwardWorkspace& w) { return w; }
  static __device__ bool contain(const BackwardWorkspace& w, const TileView& seq_head) {
    return adds_in_order(w, seq_head);
  }

  struct OfKeys : AllRows {
    __device__ OfKeys(const AttendParams&, const TileView&, const Span&) {}
    __device__ bool needs_mask_of_queries(const TileView& seq_head, const Span& keys, int32_t, const Span& queries,
                                          int32_t) const {
      return keys.end - 1 > seq_head.q_pos + queries.begin;
    }
  };
  using Facts = RowFactsLoader<OrderedWalks, kTileRows, false>;

  template <class Scores>
  static CUTLASS_DEVICE void find_probs(Scores& s, const Info& rows, float scale_log2, int32_t key) {
    sm90::find_probs<kTileRows>(s, rows, scale_log2, key);
  }
  template <class T, class Products, class Probs>
  static CUTLASS_DEVICE void find_ds(Products& ds, const Probs& probs, const Info& rows, int32_t) {
    sm90::find_ds<T, kTileRows>(ds, probs, rows);
  }
};

template <class Element, class Walks_>
struct OrderedBackward : BackwardTraits<Element, 128, kAddedKeys, kTileRows, typename Walks_::Info,
                                        OrderedExchange<Element>, kOrderedLoadThreads> {
  using Walks = Walks_;
  using Params = typename Walks::Params;
  using Workspace = typename Walks::Workspace;
  using Walk = typename Walks::OfKeys;
  using Base = BackwardTraits<Element, 128, kAddedKeys, kTileRows, typename Walks::Info, OrderedExchange<Element>,
                              kOrderedLoadThreads>;
  using Base::kHeadDim, Base::kOwned, Base::kVisited;
  using typename Base::T, typename Base::Emptying;
  using Turn = Ring<OrderedExchange<Element>::kTurns>;
  static constexpr int kColumns = kHeadDim / 2;  // of dQ, a warpgroup's
  static_assert(kVisited * kColumns == 128 * 4 * TileSums::kVectors);
  static_assert(LoadingThread<typename Base::VisitedTile>::kStep % kOrderedGroup == 0);

  // What a block owns and visits.
  struct Task {
    Walk walk;
    Span keys, tiles;
  };

  static CUTLASS_DEVICE void run(const Params& b, const Workspace& w, const TileView& seq_head, int32_t block) {
    const AttendParams& p = b.forward;
    __shared__ cuda::Shared<Task> shared_task;
    if (threadIdx.x == 0) Base::init_barriers();
    const Task& task = shared_task.make([&] {
      const int32_t kv_len = seq_head.kv_rows.size();
      return Task{Walk(p, seq_head, {block * kOwned, (block + 1) * kOwned}),
                  {block * kOwned, min_of((block + 1) * kOwned, kv_len)},
                  seeing_tiles(block, kv_len, seq_head.q_pos, seq_head.q_rows.size(), p.group())};
    });
    const Walk& walk = task.walk;
    const Span &keys = task.keys, &tiles = task.tiles;
    if (threadIdx.x >= 128) {
      cutlass::arch::warpgroup_reg_alloc<Base::kMathRegs>();
      multiply(b, Walks::sums(w), seq_head, keys, tiles, block == 0, cutlass::canonical_warp_group_idx() - 1);
      return;
    }
    cutlass::arch::warpgroup_reg_dealloc<Base::kLoadRegs>();
    const int warp = cutlass::canonical_warp_idx_sync();
    if (warp < kOrderedLoadThreads / 32)
      load(b, w, seq_head, walk, keys, tiles);
    else if (threadIdx.x % 32 == 0 && warp == kOrderedLoadThreads / 32)
      take_turns(TileSums(Walks::sums(w), p, seq_head.tile).tickets, tiles, uint32_t(block));
    else if (threadIdx.x % 32 == 0)
      pass_turns(TileSums(Walks::sums(w), p, seq_head.tile).tickets, tiles, uint32_t(block));
  }

 private:
  static CUTLASS_DEVICE void load(const Params& b, const Workspace& w, const TileView& seq_head, const Walk& walk,
                                  const Span& keys, const Span& tiles) {
    const AttendParams& p = b.forward;
    using Keys = KeyLoader<T, typename Base::OwnedTile>;
    Keys(p, p.kv.k, seq_head).template load<kOwned>(keys.begin, Base::owned(0));  // come with the first rows
    Keys(p, p.kv.v, seq_head).template load<kOwned>(keys.begin, Base::owned(1));
    const RowLoader<T, kVisited, typename Base::VisitedTile, false> rows(b, seq_head);
    const typename Walks::Facts facts(b, w, seq_head, walk, {keys.begin, keys.begin + kOwned});
    typename Base::Filling buffers;
    for (int32_t m = tiles.end - 1; m >= tiles.begin; --m) {
      const int q = buffers.await(), dout = buffers.await();
      rows.load(m, Base::visited(q), Base::visited(dout));
      facts.load(m, Base::shared().info[q]);
      buffers.hand_over(q), buffers.hand_over(dout);
    }
    sm80::cp_async_wait<0>();
  }

  // Waits until the blocks before this one have added to a tile. Runs up to kTurns tiles ahead.
  static CUTLASS_DEVICE void take_turns(const uint32_t* tickets, const Span& tiles, uint32_t block) {
    auto& exchange = Base::shared().exchange;
    Turn turn;
    for (int32_t m = tiles.end - 1; m >= tiles.begin; --m, turn.advance()) {
      exchange.passed[turn.index].wait(turn.phase ^ 1);
      if (block > 0)
        while (load_acquire(tickets + m) != block) {
        }
      exchange.turn[turn.index].arrive();
    }
  }

  // Tells the next block that this one has added to a tile. The release covers what the other threads added, as their
  // arrival came after it.
  static CUTLASS_DEVICE void pass_turns(uint32_t* tickets, const Span& tiles, uint32_t block) {
    auto& exchange = Base::shared().exchange;
    Turn turn;
    for (int32_t m = tiles.end - 1; m >= tiles.begin; --m, turn.advance()) {
      exchange.added[turn.index].wait(turn.phase);
      store_release(tickets + m, block + 1);
      exchange.passed[turn.index].arrive();
    }
  }

  static CUTLASS_DEVICE void multiply(const AttendBackwardParams& b, const BackwardWorkspace& w,
                                      const TileView& seq_head, const Span& keys, const Span& tiles, bool first,
                                      int warpgroup) {
    using namespace cute;
    const AttendParams& p = b.forward;
    auto& shared = Base::shared();
    auto& exchange = shared.exchange;
    typename Base::MmaIn mma_in;
    typename Base::MmaOut mma_out;
    // dQ of kColumns columns: dS, transposed, by the keys' columns.
    using Transposed = typename Base::Shapes::template Atom<Major::MN>;
    using LayoutDs = decltype(tile_to_shape(Transposed{}, Shape<Int<kVisited>, Int<kOwned>, _2>{}));
    using LayoutKeys = decltype(tile_to_shape(Transposed{}, Shape<Int<kColumns>, Int<kOwned>>{}));
    static_assert(kColumns == 64);  // a slab
    auto mma_dq =
        make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<Int<kVisited>, Int<kColumns>, Int<kOwned>>,
                                            Major::MN, Major::MN>());
    const auto slice_in = mma_in.get_slice(warpgroup * 128);
    const auto slice_out = mma_out.get_slice(warpgroup * 128);
    const auto slice_dq = mma_dq.get_slice(0);
    const Tensor k = slice_in.partition_fragment_A(Base::in_smem(shared.owned[0], typename Base::LayoutOwned{}));
    const Tensor values = slice_in.partition_fragment_A(Base::in_smem(shared.owned[1], typename Base::LayoutOwned{}));
    const Tensor rows = slice_in.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutVisited{}));
    const Tensor rows_t =
        slice_out.partition_fragment_B(Base::in_smem(shared.visited, typename Base::LayoutTransposed{}));
    const Tensor ds_t = slice_dq.partition_fragment_A(Base::in_smem(exchange.ds[0], LayoutDs{}));
    const Tensor k_t =
        slice_dq.partition_fragment_B(Base::in_smem(shared.owned[0] + warpgroup * kOwned * kColumns, LayoutKeys{}));
    Tensor s = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor ds = partition_fragment_C(mma_in, Shape<Int<kOwned>, Int<kVisited>>{});
    Tensor dq = partition_fragment_C(mma_dq, Shape<Int<kVisited>, Int<kColumns>>{});
    Tensor dk = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    Tensor dv = partition_fragment_C(mma_out, Shape<Int<kOwned>, Int<kHeadDim>>{});
    auto prob_left = Base::make_left(), ds_left = Base::make_left();
    clear(dk);
    clear(dv);

    const float scale_log2 = p.scale * kLog2e;
    const int32_t key = keys.begin + thread_row(warpgroup, 0);
    float4* sums = TileSums(w, p, seq_head.tile).of_thread(tiles.end - 1, warpgroup);

    Emptying buffers;
    Turn turn;
    int stage = 0;  // of dS
    const auto stage_ds = [&] {
      uint32_t thread = threadIdx.x;
      if constexpr (!Walks::kKeepsPlaces) forget(thread);
      // Where this thread's dS goes: lanes 0 to 15 say where 8 rows of one of the warp's keys go, the others where the
      // 8 rows behind them go.
      const int own_key = 64 * warpgroup + int(thread % 128 / 32 * 16 + thread % 16);
      const int behind = int(thread % 32 / 16) ^ own_key % 8;
      Element* const place = exchange.ds[0] + own_key * kVisited;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(ds_left.data());
      CUTE_UNROLL
      for (int j = 0; j < kVisited / 8; j += 2)
        SM90_U32x4_STSM_N::copy(words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3],
                                *reinterpret_cast<uint128_t*>(place + stage * kOwned * kVisited + 8 * (j ^ behind)));
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::sync(Base::kMathThreads, 0);
    };
    const auto add_dq = [&] {
      exchange.turn[turn.index].wait(turn.phase);
      if (first) {
        CUTE_UNROLL
        for (int i = 0; i < TileSums::kVectors; ++i)
          sums[i * 128] = make_float4(dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
      } else {
        CUTE_UNROLL
        for (int i = 0; i < TileSums::kVectors; ++i)
          add_to_global(sums + i * 128, dq(4 * i), dq(4 * i + 1), dq(4 * i + 2), dq(4 * i + 3));
      }
      exchange.added[turn.index].arrive();
      turn.advance();
      sums -= 2 * TileSums::kVectors * 128;
    };
    // Nothing is under way from one step to the next: there ptxas puts all products in a row (C7514).
    int q = 0, dout = 0;  // the buffers at hand; the next ones are waited for beside the product of dK
    if (tiles.size() > 0) q = buffers.await(), dout = buffers.await();
    for (int32_t left = tiles.size(); left > 0; --left) {
      issue(mma_in, k(_, _, _), rows(_, _, _, q), s, GMMA::ScaleOut::Zero);
      issue(mma_in, values(_, _, _), rows(_, _, _, dout), ds, GMMA::ScaleOut::Zero);
      finish<1>(s);
      Walks::find_probs(s, shared.info[q], scale_log2, key);
      Base::round(prob_left, s);
      issue(mma_out, prob_left, rows_t(_, _, _, dout), dv, GMMA::ScaleOut::One);
      finish<1>(ds);
      Walks::template find_ds<T>(ds, prob_left, shared.info[q], key);
      Base::round(ds_left, ds);
      stage_ds();
      issue(mma_dq, ds_t(_, _, _, stage), k_t(_, _, _), dq, GMMA::ScaleOut::Zero);
      issue(mma_out, ds_left, rows_t(_, _, _, q), dk, GMMA::ScaleOut::One);
      finish<1>(dq);
      warpgroup_fence_operand(dv);
      buffers.give_back(dout);
      const int q_before = q;
      if (left > 1) q = buffers.await(), dout = buffers.await();
      add_dq();
      finish<0>(dk);
      buffers.give_back(q_before);
      stage ^= 1;
    }
    store_keys<Base>(p, seq_head, keys, warpgroup, dk, p.scale, b.grad_k);
    store_keys<Base>(p, seq_head, keys, warpgroup, dv, 1.f, b.grad_v);
  }
};

// Finds lse and delta of the rows, and takes all tickets back. Four threads a row.
constexpr int kFactsThreads = 4 * kMostRowsOfBlock;
template <class T, class Walks>
__global__ void __launch_bounds__(kFactsThreads) row_facts_kernel(const __grid_constant__ typename Walks::Params b,
                                                                  const __grid_constant__ typename Walks::Workspace w) {
  const AttendParams& p = b.forward;
  const int32_t heads = p.kv.num_heads, seq_heads = p.batch * heads;
  const int64_t thread = int64_t(blockIdx.x) * kFactsThreads + threadIdx.x;
  const BackwardWorkspace& sums = Walks::sums(w);
  if (thread < int64_t(seq_heads) * sums.tiles_each) sums.tickets[thread] = 0;
  if (thread == 0) *sums.next = 0;
  const int32_t index = blockIdx.x % seq_heads, block = blockIdx.x / seq_heads;
  __shared__ cuda::Shared<TileView> shared_view;
  const TileView& v = shared_view.make([&] { return view_seq_head(p, index / heads, index % heads, kAddedKeys); });
  if (!Walks::contain(w, v)) return;
  const Span rows{block * kMostRowsOfBlock, min_of((block + 1) * kMostRowsOfBlock, valid_rows(p, v))};
  const int32_t row = rows.begin + int32_t(threadIdx.x) / 4;
  typename Walks::template OfRows<T>::Row(b, v, v, rows, row).finish(p, w, v, rows, row);
}

// Rounds the sums of a tile to dQ.
template <class T, class Walks>
__global__ void __launch_bounds__(256) round_sums_kernel(const __grid_constant__ typename Walks::Params b,
                                                         const __grid_constant__ typename Walks::Workspace w) {
  const AttendParams& p = b.forward;
  const int32_t heads = p.kv.num_heads, seq_heads = p.batch * heads;
  const int32_t index = blockIdx.x % seq_heads, tile = blockIdx.x / seq_heads;
  __shared__ cuda::Shared<TileView> shared_view;
  const TileView& v = shared_view.make([&] { return view_seq_head(p, index / heads, index % heads, kAddedKeys); });
  if (!Walks::contain(w, v) || tile * kTileRows >= valid_rows(p, v)) return;
  const int warpgroup = threadIdx.x / 128;
  const bool empty = blocks_seen(tile, v.q_pos, v.q_rows.size(), p.group()) == 0;
  const float4* sums = TileSums(Walks::sums(w), p, v.tile).of_thread(tile, warpgroup);
  float4 x[TileSums::kVectors];
  CUTE_UNROLL
  for (int j = 0; j < TileSums::kVectors; ++j) x[j] = empty ? float4{} : sums[j * 128];
  const int32_t lane = int32_t(threadIdx.x % 4);
  CUTE_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    const int32_t row = tile * kTileRows + thread_row(0, r);
    CUTE_UNROLL
    for (int j = 0; j < TileSums::kVectors; j += 4) {
      uint32_t word[4];
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i)
        word[i] = r == 0 ? pack<T>(x[j + i].x * p.scale, x[j + i].y * p.scale)
                         : pack<T>(x[j + i].z * p.scale, x[j + i].w * p.scale);
      const uint4 chunk = transpose_quad(word[0], word[1], word[2], word[3]);
      const int32_t column = 64 * warpgroup + 8 * (j + lane);
      if (row < valid_rows(p, v) && column < p.head_dim)
        *reinterpret_cast<uint4*>(static_cast<T*>(b.grad_q.data) + row_offset(b.grad_q.stride, v, tile_row(p, v, row)) +
                                  column) = chunk;
    }
  }
}

// Thread blocks take their work from a counter, so that those which others wait for have started (AddOrder).
template <class Body>
__global__ void __launch_bounds__(Body::kThreads, 1)
    ordered_backward_kernel(const __grid_constant__ typename Body::Params b,
                            const __grid_constant__ typename Body::Workspace w, const AddOrder order) {
  const AttendParams& p = b.forward;
  __shared__ cuda::Shared<AddOrder::Item> shared_item;
  __shared__ cuda::Shared<TileView> shared_view;
  const AddOrder::Item& item =
      shared_item.make([&] { return order[int32_t(atomicAdd(Body::Walks::sums(w).next, 1u))]; });
  const TileView& v = shared_view.make(
      [&] { return view_seq_head(p, item.seq_head / p.kv.num_heads, item.seq_head % p.kv.num_heads, kAddedKeys); });
  if (item.block * kAddedKeys < v.kv_rows.size() && Body::Walks::contain(w, v)) Body::run(b, w, v, item.block);
}

template <DType kDType, class Walks>
cudaError_t launch_in_order(const typename Walks::Params& b, const typename Walks::Workspace& w, const Device& device,
                            cudaStream_t stream) {
  using Body = OrderedBackward<CutlassElement<kDType>, Walks>;
  const AttendParams& p = b.forward;
  const int32_t seq_heads = num_seq_heads(p);
  const AddOrder order = add_order(seq_heads, ceil_div(p.kv.rows.capacity, kAddedKeys), device.num_sms);
  const auto blocks = [&](int32_t rows) { return dim3(unsigned(ceil_div_64(most_rows(p), rows) * seq_heads)); };
  using T = typename Body::T;
  if (cudaError_t e =
          launch(row_facts_kernel<T, Walks>, blocks(kMostRowsOfBlock), kFactsThreads, 0, stream, false, b, w))
    return e;
  const auto kernel = ordered_backward_kernel<Body>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes))
    return e;
  if (order.size() > 0)
    if (cudaError_t e =
            launch(kernel, dim3(unsigned(order.size())), Body::kThreads, Body::kSmemBytes, stream, false, b, w, order))
      return e;
  return launch(round_sums_kernel<T, Walks>, blocks(kTileRows), 256, 0, stream, false, b, w);
}

}  // namespace flux::cuda::sm90
