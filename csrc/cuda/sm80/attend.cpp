// The sm80 family: cp.async and mma.sync, for every GPU since compute capability 8.0.
#include "cuda/sm80/kernels.h"

namespace flux::cuda::sm80 {
namespace {

template <typename Use>
auto with_dim(int32_t head_dim, Use use) {
  if (head_dim <= 64) return use(Kernels<64>{});
  if (head_dim <= 96) return use(Kernels<96>{});
  if (head_dim <= 128) return use(Kernels<128>{});
  return use(Kernels<256>{});
}

}  // namespace

bool configure(const AttendParams& p, const Device& device, AttendConfig* c) {
  return with_dim(p.shape.head_dim, [&](auto kernels) { return kernels.configure(p, device, c); });
}

cudaError_t attend(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
  return with_dim(p.shape.head_dim, [&](auto kernels) { return kernels.attend(p, c, w, stream); });
}

}  // namespace flux::cuda::sm80
