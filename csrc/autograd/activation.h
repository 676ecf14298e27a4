// The derivative of an activation in a graph of its own: for second derivatives and maps over gradients.
#pragma once
#include "shared/torch_api.h"

namespace rf {

inline Tensor as_rows(const Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); }

// d loss / d z of act(z), in the accumulator's type, from `g`, that of the output, and what forward saved. PyTorch's
// own operators have derivatives of every order and batching rules. A saved output is already in the graph, as the
// result of its node; a saved pre-activation is not: `with_graph` records what it is a function of.
template <class F>
Tensor activation_gradient(const Tensor& g, const Tensor& saved, Activation activation, F&& with_graph) {
  const auto acc = acc_type(g.scalar_type());
  const Tensor up = as_type(g, acc);
  if (activation == Activation::none) return up;
  Tensor z = saved;
  if (saved_for(activation) == Saved::preactivation && at::GradMode::is_enabled()) with_graph(z = saved.detach());
  z = as_type(z, acc);
  switch (activation) {
    case Activation::relu:
      return at::threshold_backward(up, z, 0);
    case Activation::gelu:
      return at::gelu_backward(up, z, "none");
    case Activation::gelu_tanh:
      return at::gelu_backward(up, z, "tanh");
    case Activation::silu: {  // silu_backward has no derivative
      const Tensor sigmoid = at::sigmoid(z);
      return up * sigmoid * (1 + z * (1 - sigmoid));
    }
    case Activation::sigmoid:
      return at::sigmoid_backward(up, z);
    case Activation::tanh:
      return at::tanh_backward(up, z);
    case Activation::none:
      break;
  }
  return up;
}

}  // namespace rf
