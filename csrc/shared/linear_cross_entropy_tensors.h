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
  std::tuple<Tensor, Tensor, Tensor, Tensor> shaped(const Tensor& input, const Tensor& linear_weight,
                                                    const Tensor& its_target, bool rounded) const {
    const auto finished = [&](const Tensor& t, const Tensor& like, at::IntArrayRef sizes) {
      if (!t.defined()) return at::empty({0}, like.options());
      return (rounded ? t.to(like.scalar_type()) : t).view(sizes);
    };
    return {finished(x, input, input.sizes()), finished(w, linear_weight, linear_weight.sizes()),
            finished(bias, linear_weight, linear_weight.sizes().slice(0, linear_weight.dim() - 1)),
            finished(target, its_target, its_target.sizes())};
  }
};

}  // namespace rf
