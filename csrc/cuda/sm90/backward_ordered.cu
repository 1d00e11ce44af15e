#include "cuda/sm90/backward_ordered.h"
#include "cuda/sm90/launch_backward.h"

namespace flux::cuda::sm90 {

template <DType kDType>
cudaError_t launch_ordered_backward(const AttendBackwardParams& b, const BackwardWorkspace& w, const Device& device,
                                    cudaStream_t stream) {
  using Body = OrderedBackward<CutlassElement<kDType>>;
  using T = typename Body::T;
  const AttendParams& p = b.forward;
  const int32_t seq_heads = num_seq_heads(p);
  const AddOrder order = add_order(seq_heads, ceil_div(p.kv.rows.capacity, kAddedKeys), device.num_sms);
  const auto blocks = [&](int32_t rows) { return dim3(unsigned(ceil_div_64(most_rows(p), rows) * seq_heads)); };
  if (cudaError_t e = launch(row_facts_kernel<T>, blocks(kMostRowsOfBlock), kFactsThreads, 0, stream, false, b, w))
    return e;
  const auto kernel = ordered_backward_kernel<Body>;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Body::kSmemBytes))
    return e;
  if (order.size() > 0)
    if (cudaError_t e =
            launch(kernel, dim3(unsigned(order.size())), Body::kThreads, Body::kSmemBytes, stream, false, b, w, order))
      return e;
  return launch(round_sums_kernel<T>, blocks(kTileRows), 256, 0, stream, false, b, w);
}

template cudaError_t launch_ordered_backward<DType::kFloat16>(const AttendBackwardParams&, const BackwardWorkspace&,
                                                              const Device&, cudaStream_t);
template cudaError_t launch_ordered_backward<DType::kBFloat16>(const AttendBackwardParams&, const BackwardWorkspace&,
                                                               const Device&, cudaStream_t);

}  // namespace flux::cuda::sm90
