// Tensors as TMA takes them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

#include "core/params.h"

namespace flux::cuda::sm90 {

// Of 16-bit elements. Dimensions from the innermost (head_dim) outwards; strides in elements.
template <int kRank>
struct TensorShape {
  static constexpr int kElementBytes = 2;

  const void* data;
  int64_t size[kRank], stride[kRank];

  // What TMA asks of a tensor.
  bool describable() const {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
    for (int i = 0; i < kRank; ++i) {
      if (size[i] < 1 || size[i] > (int64_t(1) << 32)) return false;
      if (i == 0 || size[i] == 1) continue;
      const int64_t bytes = stride[i] * kElementBytes;
      if (bytes <= 0 || bytes % 16 != 0 || bytes >= int64_t(1) << 40) return false;
    }
    return true;
  }
};

// `fetch`: how much the L2 cache takes from memory at once.
template <int kRank>
cudaError_t encode(const TensorShape<kRank>& t, DType dtype, std::initializer_list<int32_t> box, CUtensorMap* map,
                   CUtensorMapL2promotion fetch = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  static const auto encode_tiled = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        e == cudaSuccess && found == cudaDriverEntryPointSuccess ? f : nullptr);
  }();
  if (!encode_tiled) return cudaErrorNotSupported;
  cuuint64_t size[kRank], stride[kRank - 1];
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) boxes[i] = steps[i] = 1;
  int n = 0;
  for (int32_t rows : box) boxes[n++] = cuuint32_t(rows);
  for (int i = 0; i < kRank; ++i) {
    size[i] = cuuint64_t(t.size[i]);
    // The stride of a dimension of one entry is never used, but must be valid.
    if (i > 0) stride[i - 1] = t.size[i] == 1 ? 16 : cuuint64_t(t.stride[i] * t.kElementBytes);
  }
  const bool wide = boxes[0] * t.kElementBytes == 128;
  const CUresult r = encode_tiled(
      map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank,
      const_cast<void*>(t.data), size, stride, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, fetch, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flux::cuda::sm90
