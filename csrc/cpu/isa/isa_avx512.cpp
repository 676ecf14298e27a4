// AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/isa/kernels.h"
#include "cpu/isa/target_region.h"
#include "cpu/kernels/prelude.h"

#if !defined(__clang__)  // gcc 12's own reductions read a deliberately undefined register
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
RF_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace rf::avx512 {
constexpr tuning::RegisterTile kTile = tuning::kTileAvx512;
#include "cpu/isa/simd_avx512.h"
#include "cpu/isa/algorithms.inl.h"
}  // namespace rf::avx512

RF_END_TARGET

namespace rf::avx512 {
#include "cpu/isa/table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("avx512");
}  // namespace rf::avx512
#endif
