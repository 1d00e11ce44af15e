// Block selection on CUDA: the choice of the kernel, its scratch memory and its launch.
#include <climits>

#include "cuda/select.h"

namespace flux::cuda {
namespace {

// At the start of the memory of a call: the counter, in a line of its own.
constexpr size_t kCounterBytes = 256;

int32_t num_seq_heads(const SelectParams& p) { return p.batch * p.kv.num_heads; }

}  // namespace

const SelectInstance* select_instance([[maybe_unused]] const SelectParams& p, int index) {
  Device device{};
  if (current_device(&device) != cudaSuccess) return nullptr;
#ifdef FLUX_SM90
  for (const SelectInstance* i : {&sm90::kSelectByTma, &sm90::kSelect})
    if (device.capability == 90 && i->fits(p) && index-- == 0) return i;
#endif
  return index == 0 ? &sm80::kSelect : nullptr;
}

Status configure(const SelectParams& p, SelectConfig* c) {
  Device device{};
  if (const Status s = supported_device(p.dtype, &device); !s.ok()) return s;
  if (!c->instance) c->instance = select_instance(p, 0);
  const SelectInstance& i = *c->instance;
  const int most = i.most_blocks(p, device);
  if (most <= 0) return {"asking how many thread blocks fit", cudaGetLastError()};
  const SelectTiling tiling(p, i.columns, i.cluster);
  const int64_t items = int64_t(num_seq_heads(p)) * tiling.items_each;
  if (items > INT_MAX / i.cluster) return {"q must have at most 2^30 tiles in all: split the batch", cudaSuccess};
  c->blocks = items * i.cluster < most ? int32_t(items) * i.cluster : most;
  c->bytes = kCounterBytes + size_t(c->blocks) * size_t(tiling.floats(p)) * sizeof(float);
  return {};
}

Status select(const SelectParams& p, const SelectConfig& c, void* memory, cudaStream_t stream) {
  const SelectTiling tiling(p, c.instance->columns, c.instance->cluster);
  const SelectKernelParams k{p, tiling, num_seq_heads(p) * tiling.items_each,
                             reinterpret_cast<float*>(static_cast<char*>(memory) + kCounterBytes),
                             static_cast<int32_t*>(memory)};
  if (cudaError_t e = c.instance->launch(k, c.blocks, stream)) return {"select", e};
  return {};
}

}  // namespace flux::cuda
