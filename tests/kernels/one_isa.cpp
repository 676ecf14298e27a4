// Takes the place of csrc/cpu/isa/dispatch.cpp in a program with the tables of kernels of RF_ISAS, a list of ISA(name),
// whatever the CPU has: the first, or REGFAST_ISA's.
#include <cstdlib>
#include <cstring>

#include "cpu/isa/amx_permission.h"
#include "cpu/isa/kernels.h"

namespace rf {

#define ISA(name)             \
  namespace name {            \
  extern const Kernels table; \
  }
RF_ISAS
#undef ISA

const Kernels* const* available_kernels() {
#define ISA(name) &name::table,
  static const Kernels* const all[] = {RF_ISAS nullptr};
#undef ISA
  return all;
}

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
#if defined(__x86_64__)
    may_use_amx();
#endif
    const char* const name = std::getenv("REGFAST_ISA");
    const Kernels* const* table = available_kernels();
    while (name && std::strcmp((*table)->isa, name) && table[1]) ++table;
    return *table;
  }();
  return *chosen;
}

}  // namespace rf
