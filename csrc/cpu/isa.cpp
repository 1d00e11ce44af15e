// Which build of the kernels runs here.
#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/kernels.h"

namespace flux::cpu {

namespace portable {
extern const Kernels table;
}
#ifdef FLUX_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

// Best first. FLUX_EXT_ISA names the best that may be used, for tests and comparisons.
const Kernels& choose() {
  const char* limit = std::getenv("FLUX_EXT_ISA");
  bool allowed = !limit || !*limit;
  const auto may_use = [&](const Kernels& k, bool supported) {
    allowed = allowed || std::strcmp(limit, k.isa) == 0;
    return allowed && supported;
  };
#ifdef FLUX_X86
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (may_use(avx512_bf16::table, has_avx512 && __builtin_cpu_supports("avx512bf16"))) return avx512_bf16::table;
  if (may_use(avx512::table, has_avx512)) return avx512::table;
  if (may_use(avx2::table, has_avx2)) return avx2::table;
#endif
  may_use(portable::table, true);
  return portable::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa() { return kernels().isa; }

}  // namespace flux::cpu
