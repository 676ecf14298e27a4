// Convolutions of half types by our products, while accelerate(products=True) lasts: ATen's for CPUs that have no
// instructions for these types (slow_conv2d) multiply one number at a time. Here as there the patches of an image are
// the columns of a matrix; where no patch shares a number with another one, as in the first layer of a vision
// transformer, it is a fully connected layer.
#include "shared/torch_api.h"

#include <ATen/ops/_slow_conv2d_backward_native.h>
#include <ATen/ops/_slow_conv2d_forward_native.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/ops/outputs.h"
#include "cpu/ops/products.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

using Pair = at::IntArrayRef;

struct Convolution {
  Pair kernel, stride, padding;
  int64_t images, channels, outputs, patches;  // of an image
  int64_t height, width;                       // of the input

  Convolution(const Tensor& input, const Tensor& weight, const Tensor& output, Pair kernel, Pair stride, Pair padding)
      : kernel(kernel),
        stride(stride),
        padding(padding),
        images(input.size(0)),
        channels(input.size(1)),
        outputs(weight.size(0)),
        patches(output.size(2) * output.size(3)),
        height(input.size(2)),
        width(input.size(3)) {}

  int64_t numbers_of_patch() const { return channels * kernel[0] * kernel[1]; }
  // Every number is a patch.
  bool pointwise() const {
    return kernel[0] * kernel[1] == 1 && stride[0] * stride[1] == 1 && padding[0] + padding[1] == 0;
  }
  bool overlaps() const { return kernel[0] > stride[0] || kernel[1] > stride[1]; }
  // Images whose patches are made at a time.
  int64_t images_at_once() const {
    return std::max<int64_t>(1, tuning::kPatchNumbers / std::max<int64_t>(1, numbers_of_patch() * patches));
  }

  // Of adjacent images a column for each patch: images x numbers x patches.
  Tensor columns(const Tensor& input) const {
    if (pointwise()) return input.view({input.size(0), channels, patches});
    return at::im2col(input, kernel, {1, 1}, padding, stride);
  }
  // The sum of what columns say of each number.
  Tensor from_columns(const Tensor& columns) const {
    if (pointwise()) return columns.view({columns.size(0), channels, height, width});
    return at::col2im(columns, {height, width}, kernel, {1, 1}, padding, stride);
  }
};

// Sizes that do not fit are left to ATen, which has words for them.
bool is_ours(const Tensor& input, const Tensor& weight, Pair kernel) {
  return is_slow_half(input) && is_slow_half(weight) && input.scalar_type() == weight.scalar_type() &&
         input.dim() == 4 && weight.dim() == 4 && input.numel() > 0 && weight.numel() > 0 && kernel.size() == 2 &&
         weight.size(1) == input.size(1) && weight.size(2) == kernel[0] && weight.size(3) == kernel[1];
}

Tensor as_matrix(const Tensor& weight) { return weight.reshape({weight.size(0), -1}); }

// A product of this matrix with each of some others.
Tensor repeated(const Tensor& matrix, int64_t times) {
  return matrix.unsqueeze(0).expand({times, matrix.size(0), matrix.size(1)});
}

// Results have their channels last in memory where one of these has, as ATen's do.
Tensor as_atens(const Tensor& result, const Tensor& input, const Tensor& weight) {
  constexpr auto last = at::MemoryFormat::ChannelsLast;
  if (input.suggest_memory_format() != last && weight.suggest_memory_format() != last) return result;
  return at::empty_like(result, result.options(), last).copy_(result);
}

int64_t patches_along(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
}

Tensor forward(const Tensor& input_, const Tensor& weight_, Pair kernel, const std::optional<Tensor>& bias, Pair stride,
               Pair padding) {
  const bool fits = is_ours(input_, weight_, kernel) && stride.size() == 2 && padding.size() == 2 &&
                    std::min({stride[0], stride[1], kernel[0], kernel[1]}) > 0 && std::min(padding[0], padding[1]) >= 0;
  const int64_t h = fits ? patches_along(input_.size(2), kernel[0], stride[0], padding[0]) : 0;
  const int64_t w = fits ? patches_along(input_.size(3), kernel[1], stride[1], padding[1]) : 0;
  const bool biased = bias && bias->defined();
  if (h * w == 0 || (biased && (bias->dim() != 1 || bias->size(0) != weight_.size(0))))
    return at::native::slow_conv2d_forward_cpu(input_, weight_, kernel, bias, stride, padding);
  const Record record("conv2d", {&input_, &weight_});
  const Tensor input = input_.contiguous(), weight = as_matrix(weight_);
  const Tensor output = empty_result({input.size(0), weight.size(0), h, w}, input.options());
  const Convolution of(input, weight_, output, kernel, stride, padding);
  const Tensor results = output.view({of.images, of.outputs, of.patches});
  for (int64_t first = 0, step = of.images_at_once(); first < of.images; first += step) {
    const int64_t count = std::min(step, of.images - first);
    const Tensor columns = of.columns(input.narrow(0, first, count)), result = results.narrow(0, first, count);
    if (!biased) {
      multiply_batches(repeated(weight, count), columns, result);
      continue;
    }
    // Rounded once, after the bias.
    const Tensor sums = at::empty(result.sizes(), result.options().dtype(acc_type(result.scalar_type())));
    multiply_batches(repeated(weight, count), columns, sums);
    sums.add_(bias->unsqueeze(1));
    result.copy_(sums);
  }
  return as_atens(output, input_, weight_);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& input_, const Tensor& weight_,
                                            Pair kernel, Pair stride, Pair padding, std::array<bool, 3> wanted) {
  if (!is_ours(input_, weight_, kernel) || grad_.dim() != 4 || grad_.numel() == 0 ||
      grad_.scalar_type() != input_.scalar_type())
    return at::native::slow_conv2d_backward_cpu(grad_, input_, weight_, kernel, stride, padding, wanted);
  const Record record("conv2d_backward", {&grad_, &input_, &weight_});
  const Tensor input = input_.contiguous(), weight = as_matrix(weight_), grad = grad_.contiguous();
  const Convolution of(input, weight_, grad, kernel, stride, padding);
  const Tensor grads = grad.view({of.images, of.outputs, of.patches});
  const auto acc = input.options().dtype(acc_type(input.scalar_type()));
  Tensor grad_input, grad_weight, grad_bias;
  if (wanted[0]) grad_input = empty_result(input.sizes(), input.options());
  const Tensor sums = wanted[1] ? at::empty(weight.sizes(), acc) : Tensor();
  for (int64_t first = 0, step = of.images_at_once(); first < of.images; first += step) {
    const int64_t count = std::min(step, of.images - first);
    const Tensor some = grads.narrow(0, first, count);
    if (wanted[0]) {
      // A number of several patches has the sum of what they say, which is rounded once.
      const Tensor columns =
          at::empty({count, of.numbers_of_patch(), of.patches}, of.overlaps() ? acc : input.options());
      multiply_batches(repeated(weight.t(), count), some, columns);
      grad_input.narrow(0, first, count).copy_(of.from_columns(columns));
    }
    if (wanted[1]) {
      const Tensor columns = of.columns(input.narrow(0, first, count));
      for (int64_t i = 0; i < count; ++i)
        multiply_batches(some.narrow(0, i, 1), columns.narrow(0, i, 1).transpose(1, 2), sums.unsqueeze(0),
                         first + i ? Sum::next : Sum::first);
    }
  }
  if (wanted[0]) grad_input = as_atens(grad_input, input_, weight_);
  if (wanted[1]) grad_weight = as_atens(sums.to(weight_.scalar_type()).view(weight_.sizes()), input_, weight_);
  if (wanted[2]) grad_bias = grad.sum({0, 2, 3});
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

void take_convolutions(torch::Library& kernels) {
  kernels.impl("_slow_conv2d_forward", TORCH_FN(forward));
  kernels.impl("_slow_conv2d_backward.output_mask", TORCH_FN(backward));
}

}  // namespace rf
