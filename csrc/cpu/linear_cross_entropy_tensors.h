// linear_cross_entropy's tensors as matrices, and its results in the shapes and types that the ops return, for every
// device.
#pragma once
#include "tensor_layouts.h"

namespace rf {

inline Tensor as_matrix(const Tensor& t) { return t.dim() == 1 ? t.unsqueeze(0) : t; }

// Losses of a row: the product of a K-dimensional weight's further dimensions.
inline int64_t positions_of(const Tensor& linear_weight) {
  return product(linear_weight.sizes(), 1, linear_weight.dim() - 1);
}

inline std::vector<int64_t> loss_shape(const Tensor& input, const Tensor& linear_weight) {
  std::vector<int64_t> shape;
  if (input.dim() == 2) shape.push_back(input.size(0));
  for (int64_t d = 1; d + 1 < linear_weight.dim(); ++d) shape.push_back(linear_weight.size(d));
  return shape;
}

inline at::ScalarType loss_type(const Tensor& input, const Tensor& target, std::optional<at::ScalarType> asked) {
  if (asked) return *asked;
  const bool wide = at::isFloatingType(target.scalar_type());
  return wide ? c10::promoteTypes(input.scalar_type(), target.scalar_type()) : input.scalar_type();
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
