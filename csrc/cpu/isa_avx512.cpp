// AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later).
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

#if !defined(__clang__)  // gcc 12's own reductions read a deliberately undefined register
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
RF_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace rf::avx512 {
constexpr tuning::RegisterTile kTile = tuning::kTileAvx512;
#include "simd_avx512.h"
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
}  // namespace rf::avx512

RF_END_TARGET

namespace rf::avx512 {
#include "table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("avx512");
}  // namespace rf::avx512
#endif
