// AArch64 Advanced SIMD, which is part of the architecture: no target region is needed.
#if defined(__aarch64__)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include <arm_neon.h>

#include "compensated_sum.h"
#include "kernels.h"
#include "tuning.h"

namespace rf::neon {
constexpr tuning::RegisterTile kTile = tuning::kTileNeon;
#include "simd_neon.h"
#include "math.inl.h"
#include "softmax.inl.h"
#include "cross_entropy.inl.h"
#include "cross_entropy_backward.inl.h"
#include "rows.inl.h"
#include "gemm_pack.inl.h"
#include "gemm.inl.h"
#include "gemm_small.inl.h"
#include "elementwise.inl.h"
#include "likelihood.inl.h"
#include "few_outputs.inl.h"
#include "sparse.inl.h"
#include "phm.inl.h"
}  // namespace rf::neon

namespace rf::neon {
#include "table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("neon");
}  // namespace rf::neon
#endif
