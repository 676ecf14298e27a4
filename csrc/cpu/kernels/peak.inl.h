// The ceiling that products are measured against.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// The float32 peak of this core: independent chains of fma, as many as the latency needs.
inline double fma_gflops(double seconds) {
  constexpr int kChains = 12, kRepeats = 4096;
  f32v acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = set1(1.0f + i);
  const f32v a = set1(0.999999f), b = set1(1e-6f);
  double done = 0, elapsed = 0;
  const auto start = std::chrono::steady_clock::now();
  while (elapsed < seconds) {
    for (int n = 0; n < kRepeats; ++n)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    done += 2.0 * f32v::size * kChains * kRepeats;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  f32v sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = sum + acc[i];
  // The result is used, so that the loop is not removed: a sum of positive numbers is not negative.
  return reduce_add(sum) < 0 ? 0 : done / elapsed * 1e-9;
}
