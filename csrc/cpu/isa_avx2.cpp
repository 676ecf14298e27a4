// AVX2 + FMA + F16C (Haswell, Zen and later).
#if defined(__x86_64__)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include <immintrin.h>

#include "compensated_sum.h"
#include "kernels.h"
#include "target_region.h"
#include "tuning.h"

RF_BEGIN_TARGET("avx2,fma,f16c")

namespace rf::avx2 {
constexpr tuning::RegisterTile kTile = tuning::kTileAvx2;
#include "simd_avx2.h"
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
}  // namespace rf::avx2

RF_END_TARGET

namespace rf::avx2 {
#include "table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("avx2");
}  // namespace rf::avx2
#endif
