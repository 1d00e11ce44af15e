// Attention on CUDA: the choice of the kernel, and the stages one after the other.
#include <climits>
#include <mutex>

#include "cuda/cuda.h"
#include "cuda/dependent_launch.h"

namespace flux::cuda {
namespace {

constexpr int kMaxDevices = 64;

__global__ void probe_kernel() { wait_for_previous(); }  // compiled as all others are

cudaError_t ask(int index, Device* d) {
  int major = 0, minor = 0;
  if (cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&d->num_sms, cudaDevAttrMultiProcessorCount, index)) return e;
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, probe_kernel)) return e;
  d->index = index;
  d->overlap = attributes.ptxVersion >= 90;
  d->capability = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device(Device* d) {
  static Device known[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  int index = 0;
  if (cudaError_t e = cudaGetDevice(&index)) return e;
  if (index >= kMaxDevices) return ask(index, d);
  std::call_once(asked[index], [&] {
    if (ask(index, d) == cudaSuccess) known[index] = *d;
  });
  *d = known[index];
  return d->capability ? cudaSuccess : ask(index, d);  // an error is not remembered
}

Status configure(const AttendParams& p, AttendConfig* c) {
  Device device{};
  if (cudaError_t e = current_device(&device)) return {"asking for the device", e};
  if (device.capability < 80) return {"flux_ext needs a GPU of compute capability 8.0 or newer", cudaSuccess};
  if (p.dtype == DType::kFloat32) return {"q must be float16 or bfloat16 on CUDA, got float32", cudaSuccess};
  if (num_seq_heads(p) >= 1 << kSeqHeadBits)
    return {"q must have less than 2^22 (sequence, KV head) pairs", cudaSuccess};
  c->overlap = device.overlap;
  const cudaError_t before = cudaPeekAtLastError();  // somebody else's, who may still want to see it
#ifdef FLUX_SM90
  const bool found = (device.capability == 90 && sm90::configure(p, device, c)) || sm80::configure(p, device, c);
#else
  const bool found = sm80::configure(p, device, c);
#endif
  if (!found)
    return {p.head_dim > 128 ? "no kernel fits: at most 64 query heads may share a KV head above head_dim 128"
                             : "no kernel fits: at most 128 query heads may share a KV head",
            cudaPeekAtLastError() == before ? cudaSuccess : cudaGetLastError()};
  if (ceil_div(p.q.max_len, c->tile.q_tokens) > kMaxSeqHeadTiles || max_tiles(p, c->tile) > INT_MAX)
    return {"q must have at most 2^20 tiles per sequence and 2^31 in all: split the batch", cudaSuccess};
  return {};
}

Status explain(const AttendParams& p, Explanation* e) {
  if (p.batch == 0 || p.q.max_len == 0) return {};
  AttendConfig c;
  if (const Status s = configure(p, &c); !s.ok()) return s;
  Device device{};
  if (cudaError_t error = current_device(&device)) return {"asking for the device", error};
  e->processor = device.capability;
  e->family = c.instance->family;
  e->decode = c.instance->tile_rows == kDecodeRows;
  e->tile_rows = c.instance->tile_rows;
  e->q_tokens = c.tile.q_tokens;
  e->kv_block = c.tile.kv_block;
  e->head_dim = c.instance->head_dim;
  e->workers = c.num_workers;
  e->plans_itself = c.inline_plan || c.order != TileOrder::kPlanned;
  e->workspace_bytes = int64_t(lay_out(p, c, nullptr).bytes);
  return {};
}

Status attend(const AttendParams& p, const AttendConfig& c, void* memory, cudaStream_t stream) {
  const Workspace w = lay_out(p, c, memory);
  if (cudaError_t e = plan(p, c, w.plan, stream)) return {"plan", e};
  if (cudaError_t e = c.instance->launch(p, c, w, stream)) return {"attend", e};
  if (c.order != TileOrder::kPlanned) return {};  // nothing was cut
  if (cudaError_t e = combine(p, c, w, stream)) return {"combine", e};
  return {};
}

}  // namespace flux::cuda
