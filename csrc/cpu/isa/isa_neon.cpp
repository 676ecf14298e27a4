// AArch64 Advanced SIMD, which is part of the architecture: no target region is needed.
#if defined(__aarch64__)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include <arm_neon.h>

#include "shared/compensated_sum.h"
#include "cpu/isa/kernels.h"
#include "cpu/tuning.h"

namespace rf::neon {
constexpr tuning::RegisterTile kTile = tuning::kTileNeon;
#include "cpu/isa/simd_neon.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/softmax.inl.h"
#include "cpu/kernels/cross_entropy.inl.h"
#include "cpu/kernels/cross_entropy_backward.inl.h"
#include "cpu/kernels/tiles.inl.h"
#include "cpu/kernels/gemm_pack.inl.h"
#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/gemm_small.inl.h"
#include "cpu/kernels/activation.inl.h"
#include "cpu/kernels/linear_nll.inl.h"
#include "cpu/kernels/linear_nll_few_outputs.inl.h"
#include "cpu/kernels/sparse.inl.h"
#include "cpu/kernels/phm_linear.inl.h"
}  // namespace rf::neon

namespace rf::neon {
#include "cpu/isa/table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("neon");
}  // namespace rf::neon
#endif
