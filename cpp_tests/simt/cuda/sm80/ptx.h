// csrc/cuda/sm80/ptx.h in C++. Shared addresses are offsets in the block's dynamic shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flux::cuda::sm80 {

inline unsigned char* shared_memory() { return simt::dynamic_shared(simt::cluster_rank()); }
inline unsigned char* shared_pointer(uint32_t address) { return shared_memory() + address; }
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - shared_memory());
}

void cp_async16(uint32_t shared, const void* global, int bytes);
void cp_async4(uint32_t shared, const void* global);
void cp_async_commit();
void cp_async_wait_for(int pending);
template <int kPending>
void cp_async_wait() {
  cp_async_wait_for(kPending);
}

inline void store_shared(uint32_t shared, uint32_t x) { std::memcpy(shared_pointer(shared), &x, 4); }
inline uint4 load_shared(uint32_t shared) {
  uint4 x;
  std::memcpy(&x, shared_pointer(shared), 16);
  return x;
}

inline void ldmatrix(uint32_t (&r)[4], uint32_t shared, bool transposed) {
  const void* const* all = simt::exchange(&shared, 4);
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int n = 0; n < 2; ++n) {
      const int row = transposed ? 2 * (lane % 4) + n : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + n;
      uint32_t address;
      std::memcpy(&address, all[8 * i + row], 4);
      std::memcpy(&pair[n], shared_pointer(address) + 2 * column, 2);
    }
    std::memcpy(&r[i], pair, 4);
  }
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t shared) { ldmatrix(r, shared, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t shared) { ldmatrix(r, shared, true); }

// Element (row, k) of a: register k / 8 * 2 + row / 8 of lane row % 8 * 4 + k % 8 / 2; (k, column) of b: register
// 4 + k / 8 of lane column * 4 + k % 8 / 2.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    T a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b[0], &b0, 4);
  std::memcpy(mine.b[1], &b1, 4);
  const void* const* all = simt::exchange(&mine, sizeof(mine));
  const int lane = simt::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto& left = *static_cast<const Fragments*>(all[row % 8 * 4 + k % 8 / 2]);
      const auto& right = *static_cast<const Fragments*>(all[column * 4 + k % 8 / 2]);
      c[i] += float(left.a[k / 8 * 2 + row / 8][k % 2]) * float(right.b[k / 8][k % 2]);
    }
  }
}

}  // namespace flux::cuda::sm80
