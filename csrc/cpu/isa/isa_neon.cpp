// AArch64 Advanced SIMD, which is part of the architecture: no target region is needed.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/isa/kernels.h"
#include "cpu/kernels/prelude.h"

namespace rf::neon {
constexpr tuning::RegisterTile kTile = tuning::kTileNeon;
#include "cpu/isa/simd_neon.h"
#include "cpu/isa/algorithms.inl.h"
}  // namespace rf::neon

namespace rf::neon {
#include "cpu/isa/table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("neon", nullptr);
}  // namespace rf::neon
#endif
