// What the kernels of each op take for granted of its arguments, for every device and for meta kernels, hence with
// symbolic sizes. Ops are public: hooks, sharding rules, decompositions and overrides call them as they stand. A
// forward op's messages name the function that users call.
#pragma once
#include "shared/checks.h"

namespace rf {

void check_reduced(const char* op, int64_t reduction);

// Of a layer, its activation by its name.
Activation check_linear_forward(const Tensor& x, const Tensor& w, const OptionalTensor& bias, string_view activation);
Activation check_linear_backward(const Tensor& grad, const OptionalTensor& input, const OptionalTensor& weight,
                                 const OptionalTensor& saved, string_view activation, std::array<bool, 3> mask);

// Of a product in the accumulator's type, which is returned.
at::ScalarType check_product(const char* op, const Tensor& a, const Tensor& b);
void check_product_bias(const Tensor& a, const Tensor& b, const OptionalTensor& bias);
void check_add_product(const Tensor& sum, const Tensor& a, const Tensor& b);

Activation check_phm_linear_forward(const Tensor& x, const Tensor& a, const Tensor& s, const OptionalTensor& bias,
                                    string_view activation);
Activation check_phm_linear_backward(const Tensor& grad, const OptionalTensor& input, const Tensor& a, const Tensor& s,
                                     const OptionalTensor& saved, string_view activation, std::array<bool, 4> mask);

// Of the softmax family, the dimension counted from 0.
constexpr const char* softmax_name(bool log) { return log ? "log_softmax" : "softmax"; }
int64_t check_softmax_forward(const char* op, const Tensor& x, int64_t dim);
int64_t check_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim);
int64_t check_logsumexp_backward(const Tensor& grad, const Tensor& x, const Tensor& lse, int64_t dim);

void check_cross_entropy_forward(const CrossEntropyOperands& t, const CrossEntropyOptions& o, int64_t outputs,
                                 OptionalType loss_dtype);
// `grad` is what the gradient of input is written over, or absent.
void check_cross_entropy_backward(const char* op, const CrossEntropyOutputGrads& upstream,
                                  const CrossEntropyOperands& t, const Tensor& stats, const Tensor& weight_sum,
                                  const CrossEntropyOptions& o, bool grad_target, const Tensor* grad = nullptr);
void check_cross_entropy_unless(const Tensor& grad_loss, const CrossEntropyOperands& t, const Tensor& stats,
                                const Tensor& weight_sum, const CrossEntropyOptions& o, const Tensor& grad,
                                double upstream);

void check_linear_cross_entropy_forward(const LinearCrossEntropyOperands& t, const CrossEntropyOptions& o,
                                        int64_t outputs, std::optional<int64_t> memory_budget, OptionalType loss_dtype,
                                        double filter_eps = 0);
void check_linear_cross_entropy_backward(const CrossEntropyOutputGrads& upstream, const LinearCrossEntropyOperands& t,
                                         const CrossEntropyOptions& o, std::optional<int64_t> memory_budget,
                                         double filter_eps, bool grad_target);

void check_linear_nll_forward(const LinearNllOperands& t, const LinearNllOptions& o, OptionalType loss_dtype,
                              bool grad_scale = false);
void check_linear_nll_backward(const Tensor& grad, const LinearNllOperands& t, const LinearNllOptions& o,
                               bool grad_scale);

void check_mse_loss(const char* op, const Tensor& x, const Tensor& target, int64_t reduction);
void check_mse_loss_backward(const Tensor& grad, const Tensor& x, const Tensor& target, int64_t reduction);

}  // namespace rf
