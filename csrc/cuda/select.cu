// Block selection on CUDA: the choice of the kernel, its scratch memory and its launch.
#include "cuda/select.h"

#include <climits>

namespace flux::cuda {
namespace {

// At the start of the memory of a call: the counter, in a line of its own.
constexpr size_t kCounterBytes = 256;

}  // namespace

Status configure(const SelectParams& p, SelectConfig* c) {
  Device device{};
  if (cudaError_t e = current_device(&device)) return {"asking for the device", e};
  if (device.capability < 80) return {"flux_ext needs a GPU of compute capability 8.0 or newer", cudaSuccess};
  if (p.dtype == DType::kFloat32) return {"q must be float16 or bfloat16 on CUDA, got float32", cudaSuccess};
#ifdef FLUX_SM90
  if (!c->instance && device.capability == 90) c->instance = &sm90::kSelect;
#endif
  if (!c->instance) c->instance = &sm80::kSelect;
  const int blocks = c->instance->blocks_per_multiprocessor(p.dtype);
  if (blocks <= 0) return {"asking how many thread blocks fit", cudaGetLastError()};
  const SelectTiling tiling(p, c->instance->columns);
  const int64_t items = int64_t(p.batch) * p.kv.num_heads * tiling.tiles, most = int64_t(blocks) * device.num_sms;
  if (items > INT_MAX) return {"q must have at most 2^31 tiles in all: split the batch", cudaSuccess};
  c->blocks = int32_t(items < most ? items : most);
  c->bytes = kCounterBytes + size_t(c->blocks) * size_t(tiling.floats(p)) * sizeof(float);
  return {};
}

Status select(const SelectParams& p, const SelectConfig& c, void* memory, cudaStream_t stream) {
  const SelectTiling tiling(p, c.instance->columns);
  if (cudaError_t e = cudaMemsetAsync(memory, 0, sizeof(int32_t), stream)) return {"select", e};
  const SelectKernelParams k{p, tiling, int64_t(p.batch) * p.kv.num_heads * tiling.tiles,
                             reinterpret_cast<float*>(static_cast<char*>(memory) + kCounterBytes),
                             static_cast<int32_t*>(memory)};
  if (cudaError_t e = c.instance->launch(k, c.blocks, stream)) return {"select", e};
  return {};
}

}  // namespace flux::cuda
