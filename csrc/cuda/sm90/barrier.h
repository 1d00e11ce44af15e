// Barriers in shared memory (mbarrier). Unlike CUTLASS's they order ordinary memory accesses for the compiler too: what
// is written before `arrive` is read after `wait`.
#pragma once

#include <cute/arch/util.hpp>

namespace flux::cuda::sm90 {

class Barrier {
 public:
  CUTE_DEVICE void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  CUTE_DEVICE void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }
  // Arrives when all that this thread began to copy with cp.async has come.
  CUTE_DEVICE void arrive_with_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
  }
  // At the same barrier of a block of the cluster.
  CUTE_DEVICE void arrive_at(uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(address()),
        "r"(rank)
        : "memory");
  }
  // Arrives; the phase also waits for so many bytes from TMA.
  CUTE_DEVICE void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  // Until the phase of this parity is complete. A new barrier is in phase 0, as if a phase of parity 1 had gone before.
  CUTE_DEVICE void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra end;\n"
        "bra again;\n"
        "end:\n"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
  CUTE_DEVICE uint64_t* pointer() { return &state_; }

 private:
  CUTE_DEVICE uint32_t address() { return cute::cast_smem_ptr_to_uint(&state_); }

  uint64_t state_;
};

}  // namespace flux::cuda::sm90
