// Takes the place of csrc/cpu/isa/dispatch.cpp where AVX-512 runs on SIMDe, whatever the CPU has.
#include "cpu/isa/kernels.h"

namespace rf {
namespace avx512 {
extern const Kernels table;
}

const Kernels* const* available_kernels() {
  static const Kernels* const only[] = {&avx512::table, nullptr};
  return only;
}
const Kernels& kernels() { return avx512::table; }

}  // namespace rf
