// Kernels of one stream that overlap: the next may start, and set itself up, before the one before it has ended
// (programmatic dependent launch, compute capability 9.0 and newer). Every kernel launched so calls wait_for_previous,
// in every block, before it touches what the kernel before it wrote or still reads. What older kernels wrote may be
// read at once if the kernel before let the next one start only after its own wait.
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

// Makes the compiler work a pointer or index out here, not after a wait that comes: only a branch keeps it from that.
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

// Brings parameters of a kernel into the constant cache, where every launch misses; best before a wait. Not all may be
// 0: only a branch keeps the compiler from reading them later.
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
