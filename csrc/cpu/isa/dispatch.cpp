// Chooses the table of kernels: once, when first asked for.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/isa/amx_permission.h"
#include "cpu/isa/kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rf {
namespace scalar {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512_amx {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif

namespace {

struct Available {
  const Kernels* best_first[6] = {};
  Available() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;  // clang's __builtin_cpu_supports does not know f16c
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bf16 && may_use_amx()) best_first[n++] = &avx512_amx::table;
    if (bf16) best_first[n++] = &avx512_bf16::table;
    if (avx512) best_first[n++] = &avx512::table;
    if (avx2) best_first[n++] = &avx2::table;
#elif defined(__aarch64__)
    best_first[n++] = &neon::table;  // part of the architecture
#endif
    best_first[n++] = &scalar::table;
  }
};

const Kernels* choose() {
  const Kernels* const* available = available_kernels();
  const char* forced = std::getenv("REGFAST_ISA");
  if (!forced || !*forced) return available[0];
  std::string names;
  for (; *available; ++available) {
    if (!std::strcmp((*available)->isa, forced)) return *available;
    names += std::string(names.empty() ? "" : ", ") + (*available)->isa;
  }
  throw std::runtime_error(std::string("REGFAST_ISA=") + forced + ": expected one that this machine runs: " + names);
}

}  // namespace

const Kernels* const* available_kernels() {
  static const Available available;
  return available.best_first;
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace rf
