// What the host asks the driver, once per device: the driver takes microseconds to answer.
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

Status supported_device(DType dtype, Device* d) {
  if (cudaError_t e = current_device(d)) return {"asking for the device", e};
  if (d->capability < 80) return {"flux_ext needs a GPU of compute capability 8.0 or newer", cudaSuccess};
  if (dtype == DType::kFloat32) return {"q must be float16 or bfloat16 on CUDA, got float32", cudaSuccess};
  return {};
}

}  // namespace flux::cuda
