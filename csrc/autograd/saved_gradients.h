// Gradients that forward computed for an upstream gradient of 1. They are saved tensors like any other, so that saved
// tensor hooks, compiled autograd and the freeing of a graph see them.
#pragma once
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>

#include "shared/torch_api.h"

namespace rf {

// Whether forward leaves gradients to backward: hooks pack away what is saved. A checkpoint would compute gradients
// twice, and offloading would move them, where the inputs alone are less and have to be saved anyway.
inline bool saved_tensors_are_packed() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

// Whether values must not decide anything and memory must not be written over: a transform or a mode is active, or the
// tensor is one that is traced, batched or a subclass.
inline bool values_are_hidden(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kHidden({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::Batched,
                                         DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper});
  return inside_transform() || c10::impl::dispatch_mode_enabled() || t.key_set().has_any(kHidden);
}

// Whether a saved tensor may be written over and given away: the graph is not kept for another backward, and nobody
// (a hook, say) has its memory but the node, which is about to let go of it.
inline bool may_give_away(const Tensor& saved) {
  return !torch::autograd::get_current_graph_task_keep_graph() && saved.storage().use_count() == 1;
}

// Makes undefined what the kernels return for what was not asked for, so that nothing is saved of it.
template <size_t n>
void keep_wanted(const std::array<Tensor*, n>& grads, const std::array<bool, n>& wanted) {
  for (size_t i = 0; i < n; ++i)
    if (!wanted[i]) *grads[i] = Tensor();
}

// Gradients that forward saved, of the first of an op's inputs, times `up` and in the inputs' types, as far as they
// are needed; nothing where forward saved none, nor for an upstream gradient that is infinite or NaN: that is the
// kernels' to multiply, since rows that take no part are no 0 times infinity. (A GPU's value nobody waits for.)
template <size_t n>
std::optional<torch::autograd::variable_list> take_saved_gradients(const Tensor& up, at::ArrayRef<Tensor> grads,
                                                                   std::initializer_list<const Tensor*> inputs,
                                                                   const std::array<bool, n>& needs) {
  if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) return std::nullopt;
  const bool hidden = values_are_hidden(up);
  const double value = !hidden && up.is_cpu() ? up.item<double>() : 0;
  if (!std::isfinite(value)) return std::nullopt;
  const bool one = value == 1;
  torch::autograd::variable_list result(n);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!needs[i]) continue;
    const Tensor& g = grads[i];
    const auto type = inputs.begin()[i]->scalar_type();
    Tensor& scaled = result[i];
    if (hidden || values_are_hidden(g)) {
      scaled = (g * up).to(type);
    } else if (g.is_cuda() && g.scalar_type() != type) {  // scaled and rounded in one pass over memory
      scaled = at::mul_out(scaled = at::empty(g.sizes(), g.options().dtype(type)), g, up);
    } else if (may_give_away(g)) {
      scaled = (one ? g : g.mul_(up)).to(type);
    } else {
      scaled = one ? g.to(type, /*non_blocking=*/false, /*copy=*/true) : (g * up).to(type);
    }
  }
  return result;
}

}  // namespace rf
