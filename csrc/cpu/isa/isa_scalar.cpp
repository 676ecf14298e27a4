// Plain C++: the baseline of the platform, always built.
#include "cpu/isa/kernels.h"
#include "cpu/kernels/prelude.h"

namespace rf::scalar {
constexpr tuning::RegisterTile kTile = tuning::kTileScalar;
#include "cpu/isa/simd_scalar.h"
#include "cpu/isa/algorithms.inl.h"
}  // namespace rf::scalar

namespace rf::scalar {
#include "cpu/isa/table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("scalar", nullptr);
}  // namespace rf::scalar
