// What the system and the CPU tell of themselves.
#include "cpu/platform.h"

#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/tuning.h"

namespace rf {

// As the system tells it, where it does.
const Caches& caches() {
  static const Caches found = [] {
    Caches c = {0, 0};
#if defined(_SC_LEVEL2_CACHE_SIZE)
    c = {sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)};
#endif
    if (c.l2 <= 0) c.l2 = tuning::kUsualL2;
    if (c.last <= 0) c.last = std::max(c.l2, tuning::kUsualLastLevelCache);
    return c;
  }();
  return found;
}

bool library_gemm_wins(DType dtype, bool pairs) {
#if defined(__x86_64__)
  struct Features {
    bool intel_avx512, avx512_bf16, amx_bf16, f16;
  };
  static const Features cpu = [] {
    unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, unused;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    if (a >= 1) __get_cpuid_count(7, 1, &a1, &unused, &unused, &unused);
    __builtin_cpu_init();
    const bool avx512_bf16 = a1 >> 5 & 1, amx_bf16 = d >> 22 & 1, avx512_fp16 = d >> 23 & 1;
    return Features{__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f"), avx512_bf16, amx_bf16, avx512_fp16};
  }();
  if (dtype == DType::f32) return cpu.intel_avx512;
  if (dtype == DType::bf16) return cpu.amx_bf16 || (cpu.avx512_bf16 && !pairs);
  if (dtype == DType::f16) return cpu.f16;
#endif
  (void)dtype, (void)pairs;
  return false;
}

}  // namespace rf
