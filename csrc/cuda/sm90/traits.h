// Compile-time description of one instance: types, layouts in shared memory, matrix instructions, thread roles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cute/tensor.hpp>

#include "core/softmax_state.h"
#include "cuda/sm90/barrier.h"
#include "cuda/worker.h"

namespace flux::cuda::sm90 {

using cute::_1;
using cute::_2;
using cute::_3;
using cute::Int;
using cute::Layout;
using cute::Shape;
using cute::Step;
using cute::GMMA::Major;

constexpr int kSharedCapacity = 227 * 1024;  // of a multiprocessor, less what the system takes
constexpr int kSharedRest = 1024;            // what is neither Q nor K nor V nor of a row
constexpr int kMaxBuffers = 12;

// The same bits, as cuda/element.h takes them.
template <class Element>
using CudaElement = std::conditional_t<std::is_same_v<Element, cutlass::half_t>, __half, __nv_bfloat16>;

// The keys of a block that some query of a tile does not see: none, only such as come after it, or any.
enum class Hidden : uint8_t { kNone, kLater, kAny };

// kWarpgroups: consumer warpgroups, 64 rows each. Work: a piece of work as shared memory describes it; of mixtures, a
// part of a tile (mix.h).
template <class Element_, int kHeadDim_, int kWarpgroups_, int kKvBlock_, class Work_ = Piece>
struct Traits {
  using Work = Work_;
  static constexpr bool kMixes = !std::is_same_v<Work, Piece>;
  using Element = Element_;
  using PackedElement = CudaElement<Element>;
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kWarpgroups_, kKvBlock = kKvBlock_;
  static constexpr int kRows = 64 * kWarpgroups;

  // Shared memory: one ring of buffers that K and V blocks take in turn, and places of a tile's size: for Q of this
  // tile and, where there is room for it beside four buffers, of the next, and for the output.
  static constexpr int kQElements = kRows * kHeadDim, kBufferElements = kKvBlock * kHeadDim;
  static constexpr int buffers_beside(int q_stages, int places) {
    const int taken = places * 2 * kQElements + q_stages * int(sizeof(SoftmaxState)) * kRows;
    const int n = (kSharedCapacity - kSharedRest - taken) / (2 * kBufferElements);
    constexpr int kMost = kMaxBuffers - kMixes;  // the parts of tiles take more room than pieces
    return n < kMost ? n : kMost;
  }
  static constexpr int kQStages = buffers_beside(2, 2) >= 4 ? 2 : 1;

  // Whether the output of a whole tile leaves through shared memory: from a place of its own, so that Q's is free when
  // the last scores are in. Of mixtures every tile's does, from the place of its Q: a part of a tile ends while the one
  // before it is still being stored.
  static constexpr bool kStagesOutput = kQStages > 1;
  static constexpr int kStoringThreads = kMixes ? 64 : kStagesOutput ? 32 : 0;
  static_assert(kStagesOutput || !kMixes);
  static constexpr bool kOwnPlace = kStagesOutput && !kMixes;
  static constexpr int kPlaces = kQStages + kOwnPlace, kBuffers = buffers_beside(kQStages, kPlaces);
  static constexpr int kOutStages = kMixes ? kQStages : 1;
  static constexpr int out_place(int stage) { return kMixes ? stage : kQStages; }

  // One producer warpgroup, then the consumers. Registers are shared out by role from what the launch gives every
  // thread alike; asking for more than that sum would wait for ever.
  static constexpr int kMathThreads = 128 * kWarpgroups, kThreads = 128 + kMathThreads;
  static constexpr int kLaunchRegs = kWarpgroups == 1 ? 224 : 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegs = kWarpgroups == 3 ? 32 : 56;
  static constexpr int kMathRegs = kWarpgroups == 3 ? 160 : kHeadDim > 128 && kWarpgroups == 1 ? 240 : 224;
  static_assert(kProducerRegs + kWarpgroups * kMathRegs <= (1 + kWarpgroups) * kLaunchRegs);

  // How the products of a block are started (docs/kernels_diary.md, v11): whether the warpgroups take turns, and
  // whether the output is rescaled while the first product runs or, where that is short, beside the exponentials.
  static constexpr bool kTakesTurns = kWarpgroups > 1 && kKvBlock != 80;
  static constexpr bool kRescalesBetween = kHeadDim > 64;

  // A tile lies in shared memory as slabs of kSlab columns, each as TMA writes it: rows of 128 (or 64) bytes, swizzled.
  static constexpr int kSlab = kHeadDim % 64 == 0 ? 64 : 32, kSlabs = kHeadDim / kSlab;
  template <Major kMajor>
  using Atom = std::conditional_t<kMajor == Major::K,
                                  std::conditional_t<kSlab == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                                     cute::GMMA::Layout_K_SW64_Atom<Element>>,
                                  std::conditional_t<kSlab == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                                     cute::GMMA::Layout_MN_SW64_Atom<Element>>>;
  using LayoutQ = decltype(tile_to_shape(Atom<Major::K>{}, Shape<Int<kRows>, Int<kHeadDim>, Int<kQStages>>{}));
  using LayoutK = decltype(tile_to_shape(Atom<Major::K>{}, Shape<Int<kKvBlock>, Int<kHeadDim>, Int<kBuffers>>{}));
  // V as the second product reads it: [D, keys].
  using LayoutVt = decltype(tile_to_shape(Atom<Major::MN>{}, Shape<Int<kHeadDim>, Int<kKvBlock>, Int<kBuffers>>{},
                                          Step<_2, _1, _3>{}));

  // S = Q K^T with both operands in shared memory; O += P V with P in registers.
  using WarpgroupLayout = Layout<Shape<Int<kWarpgroups>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, Shape<Int<kRows>, Int<kKvBlock>, Int<kHeadDim>>, Major::K,
                                 Major::K>(),
      WarpgroupLayout{}));
  using MmaPV = decltype(make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float, Shape<Int<kRows>, Int<kHeadDim>, Int<kKvBlock>>, Major::K,
                                 Major::MN>(),
      WarpgroupLayout{}));

  static_assert(cute::size<1>(typename MmaQK::AtomShape_MNK{}) == kKvBlock, "one instruction for all keys of a block");

  // What the consumers need to know of a block of K.
  struct BlockInfo {
    int32_t kv_begin;
    Hidden hidden;
  };

  // Pieces that shared memory describes at a time. Three are in use: one whose output is being stored, one whose last
  // products run, one whose first keys are waited for. Rounded up to a power of two, for the sake of `% kWorkSlots`.
  static constexpr int kWorkSlots = 4;
  // A thread block takes its next tile when so many key blocks of the one at hand are still to be loaded: enough to
  // find the tile meanwhile. Taking it any earlier would leave other thread blocks idle at the end.
  static constexpr int kBlocksAhead = 2;

  struct Shared {
    alignas(1024) Element q[kPlaces * kQElements];  // the last one the output's, if kOwnPlace
    alignas(1024) Element kv[kBuffers * kBufferElements];
    BlockInfo info[kBuffers];
    Work work[kWorkSlots];                  // none without key blocks; view.tile.seq < 0: no more
    int32_t past[kWorkSlots];               // keys of the tile's last block that lie past the sequence, if positive
    bool staged[kWorkSlots];                // does the output leave through shared memory?
    SoftmaxState states[kQStages * kRows];  // of the rows of a tile, from its last scores until it is stored
    Barrier q_full[kQStages], q_empty[kQStages];
    Barrier out_full[kOutStages];  // the output of a tile stands in its place; or it is not staged
    Barrier out_empty;             // if kOwnPlace: it has left, and its rows' states were read
    Barrier kv_full[kBuffers], kv_empty[kBuffers];
    Barrier work_full[kWorkSlots], work_empty[kWorkSlots];
    Barrier work_wanted;
  };
  static constexpr int kSharedBytes = int(sizeof(Shared));
  static_assert(kBuffers >= 4 && kSharedBytes <= kSharedCapacity);
};

// A position in a ring of n buffers; `phase` is the parity a consumer waits for.
template <int n>
struct Ring {
  int index = 0;
  uint32_t phase = 0;
  CUTLASS_DEVICE void advance() {
    if (++index == n) {
      index = 0;
      phase ^= 1;
    }
  }
};

}  // namespace flux::cuda::sm90
