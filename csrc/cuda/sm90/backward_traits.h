// The gradient kernels on Hopper; see cuda/backward.h. What those of queries and of keys share: tiles in shared memory,
// products, the ring between the warpgroup that loads and those that multiply.
//
// Two warpgroups own 64 rows or keys each, or share 64 keys. Nothing keeps them in step: while one works out P and dS,
// the other's products run.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/sm90/backward_load.h"
#include "cuda/sm90/epilogue.h"
#include "cuda/sm90/mainloop.h"

namespace flux::cuda::sm90 {

struct Nothing {
  CUTLASS_DEVICE void init() {}
};

// Info: what the consumers need to know of what is visited, besides its tiles. Exchange: what they give each other.
// kLoaders: threads of the loading warpgroup that load.
template <class Element_, int kHeadDim_, int kOwned_, int kVisited_, class Info_, class Exchange_ = Nothing,
          int kLoaders_ = kLoadThreads>
struct BackwardTraits {
  using Element = Element_;
  using T = CudaElement<Element>;
  using Info = Info_;
  using Exchange = Exchange_;
  static constexpr int kHeadDim = kHeadDim_, kOwned = kOwned_, kVisited = kVisited_, kMinBlocks = 1;
  static constexpr int kLoaders = kLoaders_;
  static constexpr bool kLeavesFull = kHeadDim == 128;

  // One warpgroup that loads, then the consumers. Registers as in Traits, traits.h.
  static constexpr int kMathThreads = 256, kThreads = kLoadThreads + kMathThreads;
  // Are the first products of a block started before the last ones of the block before it have ended? Where there are
  // registers for both, and products are short, which leaves more to hide.
  static constexpr bool kAhead = kHeadDim <= 64;
  static constexpr int kLoadRegs = kHeadDim > 128 ? 56 : 40, kMathRegs = kHeadDim > 128 ? 224 : 232;
  static_assert(kLoadRegs + 2 * kMathRegs <= 3 * (65536 / kThreads / 8 * 8));

  using OwnedTile = SlabTile<kHeadDim, kOwned, kLoaders>;
  using VisitedTile = SlabTile<kHeadDim, kVisited, kLoaders>;
  static constexpr int kOwnedElements = kOwned * kHeadDim, kVisitedElements = kVisited * kHeadDim;
  // Tiles of what is visited come in pairs (keys and values; rows of Q and of dO) through one ring of buffers.
  static constexpr int kMostBuffers = 8;
  static constexpr int kRoom = (kSharedCapacity - kSharedRest - 4 * kOwnedElements - int(sizeof(Exchange))) /
                               int(2 * kVisitedElements + sizeof(Info) + 2 * sizeof(Barrier));
  static constexpr int kBuffers = kRoom < kMostBuffers ? kRoom : kMostBuffers;
  static_assert(kBuffers >= 3);

  using Shapes = Traits<Element, kHeadDim, 2, 64>;  // for its atoms
  using LayoutOwned =
      decltype(tile_to_shape(typename Shapes::template Atom<Major::K>{}, Shape<Int<kOwned>, Int<kHeadDim>>{}));
  using LayoutVisited = decltype(tile_to_shape(typename Shapes::template Atom<Major::K>{},
                                               Shape<Int<kVisited>, Int<kHeadDim>, Int<kBuffers>>{}));
  // As the second products read it: [D, visited].
  using LayoutTransposed =
      decltype(tile_to_shape(typename Shapes::template Atom<Major::MN>{},
                             Shape<Int<kHeadDim>, Int<kVisited>, Int<kBuffers>>{}, Step<_2, _1, _3>{}));
  using WarpgroupLayout = Layout<Shape<Int<kOwned / 64>, _1, _1>>;
  // S and dP, of what is owned and visited; dQ, dK and dV, of P or dS in registers.
  using MmaIn = decltype(make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, Shape<Int<kOwned>, Int<kVisited>, Int<kHeadDim>>, Major::K,
                                 Major::K>(),
      WarpgroupLayout{}));
  using MmaOut = decltype(make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, Shape<Int<kOwned>, Int<kHeadDim>, Int<kVisited>>, Major::K,
                                 Major::MN>(),
      WarpgroupLayout{}));

  struct Shared {
    alignas(1024) Element owned[2][kOwnedElements];
    alignas(1024) Element visited[kBuffers * kVisitedElements];
    Info info[kBuffers];  // beside the first of a pair
    Exchange exchange;
    Barrier full[kBuffers], empty[kBuffers];
  };
  static constexpr int kSmemBytes = int(sizeof(Shared));
  static_assert(kSmemBytes <= kSharedCapacity - kSharedRest);

  static CUTLASS_DEVICE Shared& shared() {
    extern __shared__ __align__(1024) char raw[];
    return *reinterpret_cast<Shared*>(raw);
  }
  static CUTLASS_DEVICE OwnedTile owned(int i) { return {sm80::shared_address(shared().owned[i])}; }
  static CUTLASS_DEVICE VisitedTile visited(int buffer) {
    return {sm80::shared_address(shared().visited + buffer * kVisitedElements)};
  }

  template <class Tiles>
  static CUTLASS_DEVICE auto in_smem(Element* data, Tiles layout) {
    return cute::make_tensor(cute::make_smem_ptr(data), layout);
  }

  // By one thread, before the others come to a barrier of the block. A thread that loads arrives twice: with its copies
  // and with what it wrote itself.
  static CUTLASS_DEVICE void init_barriers() {
    for (int i = 0; i < kBuffers; ++i) {
      shared().full[i].init(2 * kLoaders);
      shared().empty[i].init(kMathThreads);
    }
    shared().exchange.init();
    cutlass::arch::fence_barrier_init();
  }

  // The ring as the loading warpgroup sees it.
  struct Filling {
    Ring<kBuffers> ring;
    CUTLASS_DEVICE int await() {
      const int i = ring.index;
      shared().empty[i].wait(ring.phase ^ 1);
      ring.advance();
      return i;
    }
    static CUTLASS_DEVICE void hand_over(int buffer) {
      shared().full[buffer].arrive_with_copies();
      shared().full[buffer].arrive();
    }
  };

  // And as a consumer does: it sees what copies of other threads have brought, by products too.
  struct Emptying {
    Ring<kBuffers> ring;
    CUTLASS_DEVICE int await() {
      const int i = ring.index;
      shared().full[i].wait(ring.phase);
      cutlass::arch::fence_view_async_shared();
      ring.advance();
      return i;
    }
    static CUTLASS_DEVICE void give_back(int buffer) { shared().empty[buffer].arrive(); }
  };

  // Results of the first products as the left operand of the second ones.
  static CUTLASS_DEVICE auto make_left() {
    return cute::make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kVisited / 16>>>{});
  }
  template <class Left, class Products>
  static CUTLASS_DEVICE void round(Left& left, const Products& from) {
    using Convert = cutlass::NumericArrayConverter<Element, float, decltype(size(from))::value>;
    *reinterpret_cast<typename Convert::result_type*>(left.data()) =
        Convert{}(*reinterpret_cast<const typename Convert::source_type*>(from.data()));
  }

  // Columns 8 j + 2 (lane % 4) + {0, 1} of row r of this thread's two go to `row_of(r)`; null: nowhere.
  template <class Output, class RowOf>
  static CUTLASS_DEVICE void store_rows(int warpgroup, const Output& out, float factor, int32_t head_dim,
                                        RowOf row_of) {
    const int32_t lane = int32_t(threadIdx.x % 4);
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      T* to = row_of(thread_row(warpgroup, r));
      CUTE_UNROLL
      for (int j = 0; j < kHeadDim / 8; j += 4) {
        uint32_t word[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (j + i) + 2 * r;
          word[i] = pack<T>(out(at) * factor, out(at + 1) * factor);
        }
        const uint4 chunk = transpose_quad(word[0], word[1], word[2], word[3]);
        if (to && 8 * (j + lane) < head_dim) *reinterpret_cast<uint4*>(to + 8 * (j + lane)) = chunk;
      }
    }
  }
};

}  // namespace flux::cuda::sm90
