// linear on the CPU.
#include "shared/torch_api.h"

#include "cpu/ops/device.h"
#include "cpu/tuning.h"
#include "shared/linear_ops.h"

namespace rf {
namespace {

struct CpuLinear : Cpu {
  using Cpu::Cpu;

  // A tensor whose elements lie apart in both directions, as the kernels that read it where it lies want it: copied
  // once, where a few dot products of its rows take less time than to gather it, and always where gathering also
  // widens. Short rows are gathered by the tiles whose lanes they become.
  Tensor gathered(const Tensor& t, int64_t other_side) const {
    if (t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1) return t;
    if (t.dim() == 2 && t.stride(0) == 1)  // transposed: kernels have ways of their own, but for few rows beside many
      return t.size(0) <= tuning::kFewRows && other_side > tuning::kSkinny ? t.contiguous() : t;
    const bool half = size_of(dtype_of(t.scalar_type())) != acc_size(dtype_of(t.scalar_type()));
    const bool few = other_side <= tuning::kSkinny || rows_of(t) <= tuning::kFewRows;
    return half || (few && t.size(-1) > tuning::kFewSides) ? t.contiguous() : t;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(regfast, CPU, m) { register_linear<CpuLinear>(m, isa_in_use); }

}  // namespace rf
