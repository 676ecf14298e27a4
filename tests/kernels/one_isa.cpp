// Takes the place of csrc/cpu/isa/dispatch.cpp in a program with one table of kernels, RF_ISA's, whatever the CPU has.
#include "cpu/isa/kernels.h"

namespace rf {
namespace RF_ISA {
extern const Kernels table;
}

const Kernels* const* available_kernels() {
  static const Kernels* const only[] = {&RF_ISA::table, nullptr};
  return only;
}
const Kernels& kernels() { return RF_ISA::table; }

}  // namespace rf
