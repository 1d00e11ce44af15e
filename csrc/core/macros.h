// What the core needs to compile for both the host and the device.
#pragma once

// Always inlined on the host too: the CPU kernels are compiled once per instruction set, and an out-of-line copy
// made with wider instructions could be the one the linker keeps for everybody.
#ifdef __CUDACC__
#define FLUX_HD __host__ __device__ __forceinline__
#else
#define FLUX_HD inline __attribute__((always_inline))
#endif
