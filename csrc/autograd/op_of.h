// Ops of ours as functions, by their names.
#pragma once
#include <algorithm>

#include "shared/torch_api.h"

namespace rf {

// A string as a template's argument.
template <size_t n>
struct Literal {
  char text[n];
  constexpr Literal(const char (&of)[n]) { std::copy_n(of, n, text); }
};

namespace named {

template <class Signature, Literal name>
struct Calls;
template <class Result, class... Arguments, Literal name>
struct Calls<Result(Arguments...), name> {
  static Result call(Arguments... arguments) {
    static const auto op = find_op<Result(Arguments...)>(name.text);
    return op.call(std::forward<Arguments>(arguments)...);
  }
  static Result below_autograd(Arguments... arguments) {
    at::AutoDispatchBelowADInplaceOrView below;
    return call(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace named

// An op as a function, looked up at its first call; and the same below autograd's keys, where what it does is recorded
// by nobody but its caller.
template <class Signature, Literal name>
constexpr auto op_of = &named::Calls<Signature, name>::call;
template <class Signature, Literal name>
constexpr auto kernels_of = &named::Calls<Signature, name>::below_autograd;

}  // namespace rf
