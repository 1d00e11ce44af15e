// Stage 3: the choice between the families of attend kernels. A family is named after the oldest GPU that it runs on:
//
//           prefill             decode (at most kDecodeRows rows)
//   sm90    sm90/kernel.h       none: sm80's, whose smaller tiles suit it, runs on Hopper too
//   sm80    sm80/prefill.h      sm80/decode.h
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

// Asked once per device: the driver takes microseconds to answer.
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

}  // namespace

Status attend_config(const AttendParams& p, AttendConfig* c) {
  Device device{};
  if (cudaError_t e = current_device(&device)) return {"asking for the device", e};
  if (device.capability < 80) return {"flux_ext needs a GPU of compute capability 8.0 or newer", cudaSuccess};
  if (p.dtype == DType::kFloat32) return {"q must be float16 or bfloat16 on CUDA, got float32", cudaSuccess};
  if (num_seq_heads(p.shape) >= 1 << kSeqHeadBits)
    return {"q must have less than 2^22 (sequence, KV head) pairs", cudaSuccess};
  c->overlap = device.overlap;
  const cudaError_t before = cudaPeekAtLastError();  // somebody else's, who may still want to see it
#ifdef FLUX_SM90
  const bool found = (device.capability == 90 && sm90::configure(p, device, c)) || sm80::configure(p, device, c);
#else
  const bool found = sm80::configure(p, device, c);
#endif
  if (!found)
    return {p.shape.head_dim > 128 ? "no kernel fits: at most 64 query heads may share a KV head above head_dim 128"
                                   : "no kernel fits: at most 128 query heads may share a KV head",
            cudaPeekAtLastError() == before ? cudaSuccess : cudaGetLastError()};
  if (ceil_div(p.shape.max_q_len, c->tile.q_tokens) > kMaxSeqHeadTiles || max_tiles(p.shape, c->tile) > INT_MAX)
    return {"q must have at most 2^20 tiles per sequence and 2^31 in all: split the batch", cudaSuccess};
  return {};
}

cudaError_t attend(const AttendParams& p, const AttendConfig& c, const Workspace& w, cudaStream_t stream) {
#ifdef FLUX_SM90
  if (c.arch == Arch::kSm90) return sm90::attend(p, c, w, stream);
#endif
  return sm80::attend(p, c, w, stream);
}

}  // namespace flux::cuda
