// AVX2 + FMA + F16C (Haswell, Zen and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/isa/kernels.h"
#include "cpu/isa/target_region.h"
#include "cpu/kernels/prelude.h"

RF_BEGIN_TARGET("avx2,fma,f16c")

namespace rf::avx2 {
constexpr tuning::RegisterTile kTile = tuning::kTileAvx2;
#include "cpu/isa/simd_avx2.h"
#include "cpu/isa/algorithms.inl.h"
}  // namespace rf::avx2

RF_END_TARGET

namespace rf::avx2 {
#include "cpu/isa/table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("avx2", nullptr);
}  // namespace rf::avx2
#endif
