// The attend kernels of this family, as the host names them; defined in kernel.h, instantiated in attend_d*.cu, one
// file per head dimension so that they compile apart.
#pragma once

#include "cuda/cuda.h"

namespace flux::cuda::sm80 {

// Rows of a tile: kDecodeRows, kSmallRows, and the most that registers and shared memory hold.
constexpr int kSmallRows = 64;
constexpr int most_tile_rows(int dim) { return dim > 128 ? 64 : 128; }

// For head dimensions up to kDim, by zero fill.
template <DType kDType, int kDim, int kRows>
struct Kernel {
  static const Instance instance;
  // How many blocks a multiprocessor of this device, the current one, holds at once; 0: an error.
  static int blocks_per_multiprocessor(int device);
};

// The kernels of the gradients, backward.h; instantiated in backward_d*.cu. The first leaves in the workspace what the
// second reads.
template <DType kDType, int kDim>
struct BackwardKernels {
  static cudaError_t launch_queries(const AttendBackwardParams& b, const BackwardWorkspace& w, cudaStream_t stream);
  static cudaError_t launch_keys(const AttendBackwardParams& b, const BackwardWorkspace& w, cudaStream_t stream);
};

}  // namespace flux::cuda::sm80
