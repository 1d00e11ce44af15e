// What the core needs to compile for both the host and the device.
#pragma once

#ifdef __CUDACC__
#define FLUX_HD __host__ __device__ __forceinline__
#else
#define FLUX_HD inline
#endif
