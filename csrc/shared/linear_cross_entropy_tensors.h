// linear_cross_entropy's tensors as matrices, and its results in the shapes and types that the ops return, for every
// device.
#pragma once
#include "shared/checks.h"
#include "shared/layouts.h"

namespace rf {

inline Tensor as_matrix(const Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t; }

// Losses of a row: the product of a K-dimensional weight's further dimensions.
inline int64_t positions_of(const Tensor& linear_weight) {
  return product(linear_weight.sizes(), 1, linear_weight.dim() - 1);
}

inline std::vector<int64_t> loss_shape(const Tensor& input, const Tensor& linear_weight) {
  return C10_AS_INTARRAYREF_SLOW(symbolic_loss_shape(input, linear_weight)).vec();
}

// Undefined where not wanted; of matrices, w and bias in the accumulator's type, target in its own.
struct LinearCrossEntropyGradients {
  Tensor x, w, bias, target;

  // As the ops return them: in the shapes of what they belong to, and, rounded, in its types.
  std::tuple<Tensor, Tensor, Tensor, Tensor> shaped(const LinearCrossEntropyOperands& of, bool rounded) const {
    const auto finished = [&](const Tensor& t, const Tensor& like, at::IntArrayRef sizes) {
      if (!t.defined()) return at::empty({0}, like.options());
      const Tensor result = rounded ? as_type(t, like.scalar_type()) : t;
      return result.sizes() == sizes ? result : result.view(sizes);
    };
    const Tensor& weight = of.linear_weight;
    return {finished(x, of.input, of.input.sizes()), finished(w, weight, weight.sizes()),
            finished(bias, weight, weight.sizes().slice(0, weight.dim() - 1)),
            finished(target, of.target, of.target.sizes())};
  }
};

}  // namespace rf
