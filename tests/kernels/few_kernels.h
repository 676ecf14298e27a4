// Included before all else by the file of an instruction set in `make kernel`: its table has the kernels whose names
// begin with a word of RF_KERNELS, for the dtypes of RF_DTYPES. The others are not compiled, which is what takes long,
// and say so when they are called.
#pragma once
#include <cstdio>
#include <cstdlib>

namespace few_kernels {

// Whether the name begins with one of the words, which end with a space each.
constexpr bool begins(const char* name, const char* words) {
  for (; *words; ++words) {
    const char* at = name;
    for (; *words != ' ' && *words == *at; ++words) ++at;
    if (*words == ' ') return true;
    while (*words != ' ') ++words;
  }
  return false;
}

template <class Kernel, class Signature>
struct Missing;
template <class Kernel, class Result, class... Arguments>
struct Missing<Kernel, Result (*)(Arguments...)> {
  static Result call(Arguments...) {
    std::printf("%s was called, which DTYPE= or NEEDS_* of tests/kernels/Makefile leaves out\n", Kernel::name());
    std::fflush(stdout);
    std::_Exit(1);
  }
};

}  // namespace few_kernels

#define RF_INSTANCE(name_, type, python, torch, kernel)                                               \
  [] {                                                                                                \
    struct Kernel {                                                                                   \
      static const char* name() { return #kernel "<" #name_ ">"; }                                    \
    };                                                                                                \
    if constexpr (few_kernels::begins(#kernel, RF_KERNELS) && few_kernels::begins(#name_, RF_DTYPES)) \
      return &kernel<type>;                                                                           \
    else                                                                                              \
      return &few_kernels::Missing<Kernel, decltype(&kernel<type>)>::call;                            \
  }(),
