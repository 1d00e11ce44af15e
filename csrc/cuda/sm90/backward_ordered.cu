#include "cuda/sm90/backward_ordered.h"

namespace flux::cuda::sm90 {

template <DType kDType>
cudaError_t launch_ordered_backward(const AttendBackwardParams& b, const BackwardWorkspace& w, const Device& device,
                                    cudaStream_t stream) {
  return launch_in_order<kDType, OrderedWalks>(b, w, device, stream);
}

template cudaError_t launch_ordered_backward<DType::kFloat16>(const AttendBackwardParams&, const BackwardWorkspace&,
                                                              const Device&, cudaStream_t);
template cudaError_t launch_ordered_backward<DType::kBFloat16>(const AttendBackwardParams&, const BackwardWorkspace&,
                                                               const Device&, cudaStream_t);

}  // namespace flux::cuda::sm90
