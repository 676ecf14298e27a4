// The arguments of the kernels: raw pointers to device memory, sizes in int64_t. Pointers to void point to elements of
// the launcher's `dtype`; "acc" means acc_t of it. No alignment beyond the element's is assumed.
#pragma once
#include "shared/types.h"

namespace rf::cuda {

// ---- activation ----------------------------------------------------------------------------------------------------

struct ActivationBackward {  // dz = dy * act'(saved), rows x columns
  const void *grad, *saved;  // saved: the forward's output or pre-activation, contiguous; null for none
  RowLayout grad_layout;     // class_stride: between columns
  void* output;              // dz, contiguous, or null: only the column sums are wanted
  int64_t rows, columns;
  Activation activation;
  void* column_sums;  // of dz before it is rounded, of `dtype`; or null
  void* workspace;    // activation_backward_workspace bytes, or null when there are no column sums
};

// ---- likelihoods ---------------------------------------------------------------------------------------------------

// The loss of each output of a linear model, prediction = product + bias, and its gradient there. Matrices are
// rows x outputs and contiguous.
struct Likelihood {
  Family family;
  int64_t rows, outputs;
  const void* product;  // acc
  const void* bias;     // one per output, or null
  const void* target;   // acc where target_is_acc, else of `dtype`
  bool target_is_acc;
  const void* scale;  // acc, one per output: a gaussian's variance, bernoulli's weight of positives; or null:
  double variance;    // a gaussian's then
  bool full;          // with a gaussian's and poisson's constants
  // Of losses and gradients; upstream, of the latter alone, acc, one per loss.
  double factor;
  const void *row_factor, *upstream;  // row_factor: acc, one per row; either may be null
  // Null where not wanted. loss: acc; loss_sums: likelihood_blocks numbers, of which the sum is the loss's.
  void* loss;
  double* loss_sums;
  void* gradient;                // of `dtype`; may be the product where that has the type
  void *bias_sums, *scale_sums;  // acc, likelihood_parts x outputs: add up to the gradients of bias and variance
};

// ---- softmax family, cross-entropy ---------------------------------------------------------------------------------

// Rows are those of a tensor's reduced dimension, anywhere in it; see RowLayout.
struct SoftmaxRows {
  int64_t rows, classes;
  const void* input;  // x; in the backward launchers the forward's output (softmax) or input (logsumexp)
  const void* grad;   // upstream gradient of softmax; null forward
  void* output;       // y or dx; null in logsumexp forward
  RowLayout in, grad_in, out;
  bool log;              // log-softmax
  void* row_result;      // logsumexp, acc, one per row: written forward, read backward
  const void* row_grad;  // logsumexp backward, acc, one per row
};

struct CrossEntropyRows {
  int64_t rows, classes;
  const void* logits;
  RowLayout layout;
  const int64_t* target;  // class of each row in row order; null when there are probabilities
  const void* probabilities;
  RowLayout probability_layout;
  const void* class_weight;      // acc, one per class, or null
  const void* class_weight_sum;  // acc, their sum; needed with weights and label smoothing, else null
  int64_t ignore_index;
  double label_smoothing, z_loss, logit_scale;
  double softcap;  // 0: none
  // acc, one per row, written forward and read backward: maximum and log of the sum of exp(z - maximum), and null where
  // not needed: the entropy (where it is an output), the sums of effective target weights and of probabilities (where
  // there are probabilities). A row that is ignored may have 0 in all of them.
  void *row_max, *row_log_sum, *row_entropy, *row_mass, *row_target_mass;
};

struct CrossEntropyResults {
  void *loss, *lse, *logprob;  // acc, one per row, null where not asked for
  int64_t* argmax;             // or null
  // The sum of the losses, or with `mean` that over weight_sum, one element of total_dtype, or null (needs loss); and
  // the sum of the rows' terms of the mean's denominator, or null.
  void* total;
  DType total_dtype;
  bool mean;
  double* weight_sum;
  void* workspace;  // cross_entropy_workspace bytes; null without total and weight_sum
};

struct CrossEntropyUpstream {  // acc
  const void* loss;            // of row r at r * loss_stride; null: 1, or in launch_cross_entropy_backward none
  int64_t loss_stride;
  const double* weight_sum;             // a mean's denominator, which divides loss; or null
  const void *lse, *entropy, *logprob;  // one per row, or null
  void* grad_logits;                    // laid out by grad_layout, may be the logits themselves; or null
  RowLayout grad_layout;
  void* grad_probabilities;  // or null
  RowLayout grad_probability_layout;
  // With loss_stride 0: do nothing if *loss is 1, because launch_cross_entropy_forward_backward has written
  // grad_logits.
  bool unless_one;
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

// C = op(A) op(B) with an epilogue, as csrc/cpu/drivers/drivers.h has it: all strides of A and B, C's columns adjacent.
struct Gemm {
  int64_t m, n, k;
  MatrixView a;  // a(i, k), or a(k, i) where transposed
  bool a_transposed;
  MatrixView b;  // b(k, j), or b(j, k) where transposed, as in X W^T
  bool b_transposed;
  void* c;
  int64_t c_stride;
  const void* bias;  // n of `dtype`, or null
  Activation activation;
  void* preactivation;  // laid out as c, or null
  void* workspace;      // gemm_workspace bytes
};

}  // namespace rf::cuda
