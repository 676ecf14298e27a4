// An op's options (see op_arguments.h) as a node of the graph keeps them: each under its number.
#pragma once
#include <string>

#include "shared/torch_api.h"

namespace rf {

template <class Options>
void save_options(torch::autograd::AutogradContext* ctx, const Options& options) {
  int next = 0;
  const auto save = [&](const auto& member) { ctx->saved_data[std::to_string(next++)] = member; };
  std::apply([&](const auto&... members) { (save(members), ...); }, options.members());
}

template <class Options>
Options saved_options(torch::autograd::AutogradContext* ctx) {
  Options options;
  int next = 0;
  const auto take = [&](const auto& member) {  // of options, which is not const, though members() is
    using T = std::decay_t<decltype(member)>;
    const_cast<T&>(member) = ctx->saved_data[std::to_string(next++)].template to<T>();
  };
  std::apply([&](const auto&... members) { (take(members), ...); }, options.members());
  return options;
}

}  // namespace rf
