// The end of a reduced loss whose forward computed its gradients too, for an upstream gradient of 1.
#pragma once
#include "../torch_api.h"

namespace rf {

// Puts what forward left in "grads", times `up` and in the types of `inputs`, into their `places` of `result`, as far
// as `mask` wants it. False where nothing is left: it is given away, so a second backward through a retained graph
// computes its own. A tracer keeps it.
inline bool take_saved_gradients(torch::autograd::AutogradContext* ctx, const Tensor& up,
                                 at::ArrayRef<const Tensor*> inputs, at::ArrayRef<bool> mask, at::ArrayRef<int> places,
                                 torch::autograd::variable_list& result) {
  auto& d = ctx->saved_data;
  const auto written = d.find("grads");
  if (written == d.end()) return false;
  const auto grads = written->second.toTensorVector();
  const bool traced = inputs[0]->unsafeGetTensorImpl()->is_python_dispatch();
  if (!traced) d.erase(written);
  const bool one = !traced && up.is_cpu() && up.item<double>() == 1;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!mask[i]) continue;
    const auto type = inputs[i]->scalar_type();
    Tensor g = grads[i];
    if (g.is_cuda() && !traced && g.scalar_type() != type) {  // scaled and rounded in one pass over memory
      Tensor rounded = at::empty(g.sizes(), g.options().dtype(type));
      result[places[i]] = at::mul_out(rounded, g, up);
      continue;
    }
    if (!one) g = traced ? g * up : g.mul_(up);
    result[places[i]] = g.scalar_type() == type ? g : g.to(type);
  }
  return true;
}

}  // namespace rf
