// The arguments of the kernels, beside those that shared/problems.h has for both devices and by its conventions: raw
// pointers to device memory, sizes in int64_t.
#pragma once
#include <cmath>

#include "shared/problems.h"

namespace rf::cuda {

// ---- activation ----------------------------------------------------------------------------------------------------

struct ActivationRows : ActivationBackward {
  int64_t rows;
  void* column_sums;  // of dz before it is rounded, of `dtype`; or null
  void* workspace;    // activation_backward_workspace bytes, or null when there are no column sums
};

// ---- likelihoods ---------------------------------------------------------------------------------------------------

// With prediction = product + bias.
struct Likelihood : LikelihoodProblem {
  int64_t rows;
  const void* product;  // acc
  const void* bias;     // one per output, or null
  bool target_is_acc;   // target is acc, else of `dtype`
  const void* scale;    // acc, one per output: a gaussian's variance, bernoulli's weight of positives; or null:
  double variance;      // a gaussian's then
  bool full;            // with a gaussian's and poisson's constants
  double factor;        // of losses and gradients
  // Null where not wanted; loss_sums: likelihood_blocks numbers, of which the sum is the loss's.
  double* loss_sums;
  void* gradient;                // of `dtype`; may be the product where that has the type
  void *bias_sums, *scale_sums;  // acc, likelihood_parts x outputs: add up to the gradients of bias and variance
};

// ---- softmax family, cross-entropy ---------------------------------------------------------------------------------

struct SoftmaxRows : SoftmaxProblem {
  int64_t rows;
};

struct CrossEntropyRows : CrossEntropyProblem {
  int64_t rows;
  const void* class_weight_sum;  // acc, of the class weights; needed with them and label smoothing, else null
};

struct CrossEntropyResults : CrossEntropyOutputs {
  // The sum of the losses, or with `mean` that over weight_sum, one element of total_dtype, or null (needs loss); and
  // the sum of the rows' terms of the mean's denominator, or null.
  void* total;
  DType total_dtype;
  bool mean;
  double* weight_sum;
  void* workspace;  // cross_entropy_workspace bytes; null without total and weight_sum
};

struct CrossEntropyUpstream : CrossEntropyBackward {  // loss null: 1, or in launch_cross_entropy_backward none
  const double* weight_sum;                           // a mean's denominator, which divides loss; or null
  // With loss_stride 0: do nothing if *loss is this, because launch_cross_entropy_forward_backward has written
  // grad_logits for it. NaN: write in any case.
  double unless = NAN;
  double of_total = 1;  // launch_cross_entropy_forward_backward's
};

// ---- parts of rows -------------------------------------------------------------------------------------------------

// A row is a sequence of adjacent parts of equal length.
struct CombineParts {  // part j of a row of `to` = sum over i of coefficients(j, i) times part i of that row of `from`
  int64_t rows, parts, to_parts, length;
  const void* from;  // acc where from_is_acc, else of `dtype`
  int64_t from_stride;
  bool from_is_acc;
  const void* coefficients;  // acc, to_parts x parts
  void* to;                  // contiguous
};

struct PartProducts {  // sums(j, i) = over all rows the dot products of part j of `of` with part i of `with`
  int64_t rows, of_parts, parts, length;
  const void* of;    // acc, contiguous
  const void* with;  // of `dtype`
  int64_t with_stride;
  void* sums;  // acc, part_products_blocks x of_parts x parts: they add up to them
};

// ---- GEMM ----------------------------------------------------------------------------------------------------------

struct Gemm : GemmProblem {
  void* workspace;  // gemm_workspace bytes
};

}  // namespace rf::cuda
