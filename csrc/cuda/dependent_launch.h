// Kernels that start before the previous kernel of their stream has ended, so that their start hides behind its end
// (programmatic dependent launch, compute capability 9.0 and newer). What that asks of them:
// - Every block calls wait_for_previous, which returns when the previous kernel has ended, before it reads what that
//   kernel wrote or writes what that kernel reads.
//   One that touches neither may leave without, if another block of the kernel waits.
// - A block calls let_next_start when the next kernel may start. All kernels launched in this way call it after their
//   own wait. So while the next one runs, all kernels before the previous one have ended: what those wrote it may read
//   at once. (But for plan.cu's clear_kernel: what follows it reads nothing before its wait.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flux::cuda {

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Makes the compiler compute a pointer or index here, before a wait that follows; it would move that to the first use,
// behind the wait. What it does not move is a branch: this one, on the value, is never taken.
__device__ inline void work_out([[maybe_unused]] const void* pointer) {
#ifdef __CUDA_ARCH__
  if (pointer == nullptr) __trap();
#endif
}
__device__ inline void work_out([[maybe_unused]] int32_t index) {
#ifdef __CUDA_ARCH__
  if (index < 0) __trap();
#endif
}

// Reads one word of every 64 bytes of a kernel's parameters. No launch finds its parameters in the constant cache; read
// before a wait, they are there after it. The branch, never taken as parameters are not all 0, keeps the compiler from
// leaving the reads out.
template <typename... Params>
__device__ void touch([[maybe_unused]] const Params&... params) {
#ifdef __CUDA_ARCH__
  constexpr int kLine = 16;  // words
  uint32_t any = 0;
  const auto read = [&](const auto& p) {
    const auto* words = reinterpret_cast<const uint32_t*>(&p);
    constexpr int kWords = sizeof(p) / 4;
#pragma unroll
    for (int i = 0; i < kWords; i += kLine) any |= words[i];
    any |= words[kWords - 1];
  };
  (read(params), ...);
  if (any == 0) __trap();
#endif
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   bool overlap, const Args&... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace flux::cuda
