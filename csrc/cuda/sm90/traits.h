// Compile-time description of one instance: types, layouts in shared memory, matrix instructions, thread roles.
#pragma once

#include <cute/tensor.hpp>

#include <cutlass/arch/barrier.h>
#include <cutlass/numeric_types.h>

#include "cuda/worker.h"

namespace flux::cuda::sm90 {

using cute::_1;
using cute::_2;
using cute::_3;
using cute::GMMA::Major;
using cute::Int;
using cute::Layout;
using cute::Shape;
using cute::Step;

constexpr int kSharedCapacity = 227 * 1024;  // of a multiprocessor, less what the system takes

// Buffers for K, and as many for V: as many as fit beside Q and the barriers.
constexpr int stages_that_fit(int q_elements, int stage_elements) {
  const int n = (kSharedCapacity - 1536 - 2 * q_elements) / (4 * stage_elements);
  return n < 6 ? n : 6;
}

// kWarpgroups: consumer warpgroups, 64 rows each.
template <class Element_, int kHeadDim_, int kWarpgroups_, int kKvBlock_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kWarpgroups_, kKvBlock = kKvBlock_;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kStageElements = kKvBlock * kHeadDim;
  static constexpr int kStages = stages_that_fit(kRows * kHeadDim, kStageElements);

  // One producer warpgroup, then the consumers. Registers are shared out by role from what the launch gives every
  // thread alike; asking for more than that sum would wait for ever.
  static constexpr int kMathThreads = 128 * kWarpgroups, kThreads = 128 + kMathThreads;
  static constexpr int kLaunchRegs = kWarpgroups == 1 ? 224 : 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegs = kWarpgroups == 3 ? 32 : 56;
  static constexpr int kMathRegs = kWarpgroups == 3 ? 160 : 224;
  static_assert(kProducerRegs + kWarpgroups * kMathRegs <= (1 + kWarpgroups) * kLaunchRegs);

  // A tile lies in shared memory as slabs of kSlab columns, each as TMA writes it: rows of 128 (or 64) bytes, swizzled.
  static constexpr int kSlab = kHeadDim % 64 == 0 ? 64 : 32, kSlabs = kHeadDim / kSlab;
  template <Major kMajor>
  using Atom = std::conditional_t<
      kMajor == Major::K,
      std::conditional_t<kSlab == 64, cute::GMMA::Layout_K_SW128_Atom<Element>, cute::GMMA::Layout_K_SW64_Atom<Element>>,
      std::conditional_t<kSlab == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                         cute::GMMA::Layout_MN_SW64_Atom<Element>>>;
  using LayoutQ = decltype(tile_to_shape(Atom<Major::K>{}, Shape<Int<kRows>, Int<kHeadDim>>{}));
  using LayoutK = decltype(tile_to_shape(Atom<Major::K>{}, Shape<Int<kKvBlock>, Int<kHeadDim>, Int<kStages>>{}));
  // V as the second product reads it: [D, keys].
  using LayoutVt = decltype(tile_to_shape(Atom<Major::MN>{}, Shape<Int<kHeadDim>, Int<kKvBlock>, Int<kStages>>{},
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

  using Barrier = cutlass::arch::ClusterBarrier;
  using TmaBarrier = cutlass::arch::ClusterTransactionBarrier;

  // What the consumers need to know of a key block in a stage.
  struct BlockInfo {
    int32_t kv_begin;
    bool masked;
  };

  static constexpr int kWorkSlots = 2;

  struct Shared {
    alignas(1024) Element q[kRows * kHeadDim];
    alignas(1024) Element k[kStages * kStageElements];
    alignas(1024) Element v[kStages * kStageElements];
    BlockInfo info[kStages];
    Piece work[kWorkSlots];  // view.tile.seq < 0: no more
    TmaBarrier q_full, k_full[kStages], v_full[kStages];
    Barrier q_empty, k_empty[kStages], v_empty[kStages];
    Barrier work_full[kWorkSlots], work_empty[kWorkSlots];
  };
  static constexpr int kSharedBytes = int(sizeof(Shared));
  static_assert(kStages >= 2 && kSharedBytes <= kSharedCapacity);
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
