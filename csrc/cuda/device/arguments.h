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

struct CombineParts : CombinePartsProblem {
  int64_t rows;
  bool from_is_acc;  // else of `dtype`, as `to` is
};

struct PartProducts : PartProductsProblem {  // sums: part_products_blocks of them, which add up to those of all rows
  int64_t rows;
};

// ---- GEMM ----------------------------------------------------------------------------------------------------------

struct Gemm : GemmProblem {
  void* workspace;  // gemm_workspace bytes
};

}  // namespace rf::cuda
