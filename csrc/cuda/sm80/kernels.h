// The kernels of one head dimension; instantiated in attend_d*.cu, one file per dimension so that they compile apart.
#pragma once

#include "cuda/cuda.h"

namespace flux::cuda::sm80 {

constexpr int kSmallRows = 64;
constexpr int prefill_rows(int dim) { return dim > 128 ? 64 : 128; }

// For head dimensions up to kDim, by zero fill.
template <int kDim>
struct Kernels {
  static bool configure(const AttendParams& p, const Device& device, AttendConfig* c);
  static cudaError_t attend(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream);
};

}  // namespace flux::cuda::sm80
