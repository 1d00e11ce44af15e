// Which build of the kernels runs here.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/broken_rule.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

#ifdef FLUX_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace amx_bf16 {
extern const Kernels table;
}
#endif

namespace {

struct Build {
  const Kernels& kernels;
  bool runs_here;
};

#ifdef FLUX_X86
// Whether the processor has the matrix unit and Linux lets this process use it. (It wants to be asked: a thread's tiles
// are 8 KiB to save.)
bool may_use_amx() {
#ifdef FLUX_EMULATE_AMX
  return true;
#else
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // CPUID 7.0 EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

// Best first. `limit` is what FLUX_EXT_ISA says, or null.
std::vector<Build> builds([[maybe_unused]] const char* limit) {
  std::vector<Build> found;
#ifdef FLUX_X86
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx512_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  // Linux is asked only if the unit may be used: its permission holds for the whole process, for good, and from then on
  // it refuses signal stacks that are too small for the tiles.
  const bool wants_amx = !limit || !*limit || !std::strcmp(limit, amx_bf16::table.isa);
  found.push_back({amx_bf16::table, wants_amx && has_avx512_bf16 && may_use_amx()});
  found.push_back({avx512_bf16::table, has_avx512_bf16});
  found.push_back({avx512::table, has_avx512});
  found.push_back({avx2::table, has_avx2});
#endif
  found.push_back({portable::table, true});
  return found;
}

// FLUX_EXT_ISA names the best that may be used.
const Kernels& choose() {
  const char* limit = std::getenv("FLUX_EXT_ISA");
  const std::vector<Build> all = builds(limit);
  auto best = all.begin();
  if (limit && *limit) {
    best = std::find_if(all.begin(), all.end(), [&](const Build& b) { return !std::strcmp(b.kernels.isa, limit); });
    if (best == all.end()) {
      std::string names;
      for (const Build& b : all) names += std::string(names.empty() ? "" : ", ") + b.kernels.isa;
      throw std::invalid_argument(kBrokenRule + ("the environment variable FLUX_EXT_ISA must be one of " + names) +
                                  ", got " + limit);
    }
  }
  return std::find_if(best, all.end(), [](const Build& b) { return b.runs_here; })->kernels;  // portable at the latest
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa() { return kernels().isa; }

}  // namespace flux::cpu
