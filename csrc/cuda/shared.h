// A value in shared memory, where it costs no registers.
#pragma once

#include <cuda_runtime.h>

namespace flux::cuda {

// All threads of a block call `make`; one of them makes the value.
template <typename Value>
struct Shared {
  __align__(16) unsigned char memory[sizeof(Value)];  // its members have initial values

  template <typename Make>
  __device__ const Value& make(Make make) {
    auto& value = *reinterpret_cast<Value*>(memory);
    if (threadIdx.x == 0) value = make();
    __syncthreads();
    return value;
  }
};

}  // namespace flux::cuda
