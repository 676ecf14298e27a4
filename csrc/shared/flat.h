// Structs among the arguments of ops. A schema lists tensors and options one by one; beneath it they are structs, which
// name their members once, in the schema's order:
//     auto members() const { return std::tie(first, second); }
// flat<f>() is the function f as the dispatcher calls it; what find_op finds is called as f is. All of it is resolved
// when compiled: members are passed on as they came, and flat<f>() of a function without such structs is f itself.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace rf {
namespace flattening {

template <class...>
struct Types {};

// Tensors are passed by reference, anything else by value.
template <class T>
constexpr bool kTensor = std::is_same_v<T, at::Tensor> || std::is_same_v<T, std::optional<at::Tensor>>;
template <class... T>
Types<std::conditional_t<kTensor<T>, const T&, T>...> passed(std::tuple<const T&...>);

// Types of a struct's members as the dispatcher passes them; void of anything else.
template <class T, class = void>
struct Members {
  using types = void;
};
template <class T>
struct Members<T, std::void_t<decltype(std::declval<const T&>().members())>> {
  using types = decltype(passed(std::declval<const T&>().members()));
};

// A signature whose argument `Struct` is to give way to its members.
template <class Result, class Before, class Struct, class Members, class After>
struct Expansion;
template <class Result, class... Before, class Struct, class... Members, class... After>
struct Expansion<Result, Types<Before...>, Struct, Types<Members...>, Types<After...>> {
  using type = Expansion;
  using Signature = Result(Before..., Members..., After...);

  // fn as a function of the members; and an op of the members, called with the struct.
  template <auto fn>
  static Result gather(Before... before, Members... members, After... after) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-braces"  // the first members may be a base's
    return fn(std::forward<Before>(before)..., Struct{std::forward<Members>(members)...},
              std::forward<After>(after)...);
#pragma GCC diagnostic pop
  }
  template <class Op>
  static Result spread(const Op& op, Before... before, const Struct& given, After... after) {
    return std::apply(
        [&](const auto&... members) {
          return op.call(std::forward<Before>(before)..., members..., std::forward<After>(after)...);
        },
        given.members());
  }
};

// The expansion of a signature's first struct; void where it has none.
template <class Result, class Before, class... Rest>
struct First {
  using type = void;
};
template <class Result, class... Before, class Next, class... After>
struct First<Result, Types<Before...>, Next, After...> {
  using Struct = std::decay_t<Next>;
  using Inside = typename Members<Struct>::types;
  using type = typename std::conditional_t<std::is_void_v<Inside>, First<Result, Types<Before..., Next>, After...>,
                                           Expansion<Result, Types<Before...>, Struct, Inside, Types<After...>>>::type;
};
template <class Result, class... Arguments>
typename First<Result, Types<>, Arguments...>::type expand(Result (*)(Arguments...));
template <class Signature>
using Expanded = decltype(expand((Signature*)nullptr));

}  // namespace flattening

template <auto fn>
constexpr auto flat() {
  using Expansion = flattening::Expanded<std::remove_pointer_t<decltype(fn)>>;
  if constexpr (std::is_void_v<Expansion>)
    return fn;
  else
    return flat<&Expansion::template gather<fn>>();
}

template <class Signature, class Inner>
struct Op;
template <class Result, class... Arguments, class Inner>
struct Op<Result(Arguments...), Inner> {
  Inner inner;  // the same op with the members of the first struct

  Result call(Arguments... arguments) const {
    return flattening::Expanded<Result(Arguments...)>::spread(inner, std::forward<Arguments>(arguments)...);
  }
  bool hasKernelForDispatchKey(c10::DispatchKey key) const { return inner.hasKernelForDispatchKey(key); }
};

// A schema of ours as a typed handle, looked up once per call site.
template <class Signature>
auto find_op(const char* name) {
  using Expansion = flattening::Expanded<Signature>;
  if constexpr (std::is_void_v<Expansion>) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  } else {
    const auto inner = find_op<typename Expansion::Signature>(name);
    return Op<Signature, std::decay_t<decltype(inner)>>{inner};
  }
}

}  // namespace rf
