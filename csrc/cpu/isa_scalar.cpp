// Plain C++: the baseline of the platform, always built.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "compensated_sum.h"
#include "kernels.h"
#include "tuning.h"

namespace rf::scalar {
constexpr tuning::RegisterTile kTile = tuning::kTileScalar;
#include "simd_scalar.h"
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
}  // namespace rf::scalar

namespace rf::scalar {
#include "table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("scalar");
}  // namespace rf::scalar
