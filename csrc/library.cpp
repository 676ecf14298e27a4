// Every op's schema, one line each. Ops named composite_* are implemented in Python by reference.py and serve the
// derivatives that have no kernel.
#include "shared/torch_api.h"

#include <torch/library.h>

#define RF_CROSS_ENTROPY_OPTIONS \
  "int ignore_index, int reduction, float label_smoothing, float z_loss, float? softcap, float? logit_scale"
#define RF_CROSS_ENTROPY_GRADS "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_logprob"
#define RF_CROSS_ENTROPY_SAVED "Tensor target, Tensor? weight, Tensor stats, Tensor weight_sum"
#define RF_LINEAR_CROSS_ENTROPY \
  "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
#define RF_BUDGET "int? memory_budget"
#define RF_LINEAR_NLL                                                                                \
  "Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? scale, Tensor? sample_weight, " \
  "int family, float variance, bool full, int reduction"
#define RF_PHM_LINEAR "Tensor input, Tensor a, Tensor s, Tensor? bias"

TORCH_LIBRARY(regfast, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor");
  m.def(
      "linear_forward(Tensor input, Tensor weight, Tensor? bias, str activation, bool save_preactivation) -> (Tensor "
      "output, Tensor preactivation)");
  m.def(
      "linear_backward(Tensor grad, Tensor? input, Tensor? weight, Tensor? saved, str activation, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
  // Products of matrices in the accumulator's type, which one of the factors of a half type may have.
  m.def("_product(Tensor a, Tensor b, Tensor? bias) -> Tensor");
  m.def("_add_product_(Tensor(a!) sum, Tensor a, Tensor b) -> ()");
  m.def("composite_linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor");

  m.def("phm_linear(" RF_PHM_LINEAR ", str activation) -> Tensor");
  m.def("phm_linear_forward(" RF_PHM_LINEAR
        ", str activation, bool save_preactivation) -> (Tensor output, Tensor preactivation)");
  m.def(
      "phm_linear_backward(Tensor grad, Tensor? input, Tensor a, Tensor s, Tensor? saved, str activation, bool[4] "
      "output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_phm_linear(" RF_PHM_LINEAR ", str activation) -> Tensor");

  m.def("softmax(Tensor input, int dim, bool log) -> Tensor");
  m.def("softmax_forward(Tensor input, int dim, bool log) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor output, int dim, bool log) -> Tensor");
  m.def("composite_softmax(Tensor input, int dim, bool log) -> Tensor");

  m.def("logsumexp(Tensor input, int dim, bool keepdim) -> Tensor");
  m.def("logsumexp_forward(Tensor input, int dim, bool keepdim) -> Tensor");
  m.def("logsumexp_backward(Tensor grad, Tensor input, Tensor lse, int dim) -> Tensor");
  m.def("composite_logsumexp(Tensor input, int dim, bool keepdim) -> Tensor");

  m.def("cross_entropy(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", int outputs, bool inplace_backward, ScalarType? loss_dtype) -> Tensor[]");
  m.def("cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", int outputs, ScalarType? loss_dtype) -> Tensor[]");
  m.def("cross_entropy_backward(" RF_CROSS_ENTROPY_GRADS ", Tensor input, " RF_CROSS_ENTROPY_SAVED
        ", " RF_CROSS_ENTROPY_OPTIONS ", bool[2] output_mask) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward_(" RF_CROSS_ENTROPY_GRADS ", Tensor(a!) input, " RF_CROSS_ENTROPY_SAVED
        ", " RF_CROSS_ENTROPY_OPTIONS ", bool grad_target) -> Tensor");
  // Loss and gradient from one read of the logits. The gradient is that for an upstream gradient which is expected, and
  // backward_unless_ writes it again if another one comes.
  m.def("cross_entropy_forward_backward(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", ScalarType? loss_dtype, float upstream) -> (Tensor loss, Tensor stats, Tensor weight_sum, Tensor grad)");
  m.def("cross_entropy_backward_unless_(Tensor grad_loss, Tensor input, " RF_CROSS_ENTROPY_SAVED
        ", " RF_CROSS_ENTROPY_OPTIONS ", Tensor(a!) grad, float upstream) -> ()");
  m.def("composite_cross_entropy(Tensor input, Tensor target, Tensor? weight, " RF_CROSS_ENTROPY_OPTIONS
        ", int outputs, ScalarType? loss_dtype) -> Tensor[]");

  m.def("linear_cross_entropy(" RF_LINEAR_CROSS_ENTROPY ", int outputs, " RF_BUDGET
        ", float filter_eps, ScalarType? loss_dtype) -> Tensor[]");
  m.def("linear_cross_entropy_forward(" RF_LINEAR_CROSS_ENTROPY ", int outputs, " RF_BUDGET
        ", ScalarType? loss_dtype) -> Tensor[]");
  // A reduced loss, and its gradients for an upstream gradient of 1, in the accumulator's type.
  m.def("linear_cross_entropy_forward_backward(" RF_LINEAR_CROSS_ENTROPY ", bool argmax, " RF_BUDGET
        ", float filter_eps, ScalarType? loss_dtype, bool[3] output_mask) -> (Tensor loss, Tensor argmax, Tensor, "
        "Tensor, Tensor)");
  m.def("linear_cross_entropy_backward(" RF_CROSS_ENTROPY_GRADS ", " RF_LINEAR_CROSS_ENTROPY ", " RF_BUDGET
        ", float filter_eps, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_linear_cross_entropy(" RF_LINEAR_CROSS_ENTROPY ", int outputs, ScalarType? loss_dtype) -> Tensor[]");

  // scale: a gaussian's variance, or bernoulli's pos_weight; variance: a gaussian's without scale.
  m.def("linear_nll(" RF_LINEAR_NLL ", ScalarType? loss_dtype) -> Tensor");
  m.def("linear_nll_forward(" RF_LINEAR_NLL ", ScalarType? loss_dtype) -> Tensor");
  // A reduced loss, and its gradients for an upstream gradient of 1, in the accumulator's type.
  m.def("linear_nll_forward_backward(" RF_LINEAR_NLL
        ", ScalarType? loss_dtype, bool[4] output_mask) -> (Tensor loss, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_nll_backward(Tensor grad, " RF_LINEAR_NLL ", bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_linear_nll(" RF_LINEAR_NLL ", ScalarType? loss_dtype) -> Tensor");

  m.def("mse_loss(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def("mse_loss_forward(Tensor input, Tensor target, int reduction) -> Tensor");
  m.def(
      "mse_loss_backward(Tensor grad, Tensor input, Tensor target, int reduction, bool[2] output_mask) -> (Tensor, "
      "Tensor)");
  m.def("composite_mse_loss(Tensor input, Tensor target, int reduction) -> Tensor");

  // Puts our products in the place of ATen's on the CPU, from so many multiplications on by dtype, or takes them out.
  m.def("_override_products(bool on, int[] least) -> ()");
}
