// For tools that read a file of cpu/kernels by itself (.clangd includes this before it): what an instruction set's file
// puts around the algorithms, with the scalar vocabulary. Nothing is built with it.
#pragma once
#include "cpu/isa/kernels.h"
#include "cpu/kernels/prelude.h"

namespace rf::scalar {
constexpr tuning::RegisterTile kTile = tuning::kTileScalar;
#include "cpu/isa/simd_scalar.h"
}  // namespace rf::scalar

using namespace rf;
using namespace rf::scalar;
