// The arguments of kernels that both devices have, each with one meaning; what one of them needs besides (scratch
// memory, sums of blocks) its own structs add, in cpu/kernels/arguments.h and cuda/device/arguments.h. Pointers to void
// point to elements of the dtype that a kernel is for; "acc" means acc_t of it (float, or double for double). No
// alignment beyond the element's is assumed. Every member has a value, so that one may name those that matter.
#pragma once
#include "shared/types.h"

namespace rf {

// ---- softmax family ------------------------------------------------------------------------------------------------

// Rows are those of a tensor's reduced dimension, anywhere in it; see RowLayout.
struct SoftmaxProblem {
  const void* input = nullptr;  // x, or in the backward kernels: the forward's output (softmax) or input (logsumexp)
  const void* grad = nullptr;   // upstream gradient of softmax; null forward
  void* output = nullptr;       // y or dx; null in logsumexp forward
  RowLayout in = {}, grad_in = {}, out = {};
  int64_t classes = 0;
  bool log = false;                // log-softmax
  void* row_result = nullptr;      // logsumexp, acc, one per row: written forward, read backward
  const void* row_grad = nullptr;  // logsumexp backward, acc, one per row
};

// ---- cross-entropy -------------------------------------------------------------------------------------------------

struct CrossEntropyProblem {
  const void* logits = nullptr;
  RowLayout layout = {};
  int64_t classes = 0;
  const int64_t* target = nullptr;  // class of each row in row order; null when there are probabilities
  const void* probabilities = nullptr;
  RowLayout probability_layout = {};
  const void* class_weight = nullptr;  // acc, one per class, or null
  int64_t ignore_index = 0;
  double label_smoothing = 0, z_loss = 0, logit_scale = 0;
  double softcap = 0;  // 0: none
  // acc, one per row, written forward and read backward: maximum and log of the sum of exp(z - maximum), and null where
  // not needed: the entropy (where it is an output), the sums of effective target weights and of probabilities (where
  // there are probabilities). A row that is ignored may have 0 in all of them.
  void *row_max = nullptr, *row_log_sum = nullptr, *row_entropy = nullptr, *row_mass = nullptr,
       *row_target_mass = nullptr;
};

struct CrossEntropyOutputs {  // acc, one per row, null where not asked for
  void *loss = nullptr, *lse = nullptr, *logprob = nullptr;
  int64_t* argmax = nullptr;
};

struct CrossEntropyBackward {  // upstream gradients, acc, and where those of the operands go
  const void* loss = nullptr;  // of row r at r * loss_stride
  int64_t loss_stride = 0;
  const void *lse = nullptr, *entropy = nullptr, *logprob = nullptr;  // one per row, or null
  void* grad_logits = nullptr;  // laid out by grad_layout, may be the logits themselves; or null
  RowLayout grad_layout = {};
  void* grad_probabilities = nullptr;  // or null
  RowLayout grad_probability_layout = {};
};

// ---- activation ----------------------------------------------------------------------------------------------------

struct ActivationBackward {  // dz = dy * act'(saved), rows x columns
  const void* grad = nullptr;
  const void* saved = nullptr;  // the forward's output or pre-activation, contiguous; null for none
  RowLayout grad_layout = {};   // class_stride: between columns
  void* output = nullptr;       // dz, contiguous, or null: only the column sums are wanted
  int64_t columns = 0;
  Activation activation = Activation::none;
};

// ---- likelihoods ---------------------------------------------------------------------------------------------------

// The loss of each output of a linear model and its slope there. Matrices are rows x outputs and contiguous.
struct LikelihoodProblem {
  Family family = Family::squared;
  int64_t outputs = 0;
  // Of one type, acc or the kernel's dtype: observations, the upstream gradient of each loss or null (1), the losses
  // or null where they are not wanted.
  const void* target = nullptr;
  const void *row_weight = nullptr, *grad = nullptr;  // row_weight: acc, of a row's losses and slopes; or null (1)
  void* loss = nullptr;
};

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// C = activation(op(A) op(B) + bias): all strides of A and B, C's columns adjacent.
struct GemmProblem {
  int64_t m = 0, n = 0, k = 0;
  MatrixView a = {};  // a(i, k), or a(k, i) where transposed
  bool a_transposed = false;
  MatrixView b = {};  // b(k, j), or b(j, k) where transposed, as in X W^T
  bool b_transposed = false;
  void* c = nullptr;
  int64_t c_stride = 0;
  const void* bias = nullptr;  // n of C's type, or null
  Activation activation = Activation::none;
  void* preactivation = nullptr;  // laid out as c, or null
  // The CPU's GEMM alone has these: what is acc beside operands of a half type (C's type is bias's and
  // pre-activation's), whether the product is added to C, and so many biases in which the rows of C take turns,
  // bias_stride apart.
  bool wide_a = false, wide_b = false, wide_c = false, accumulate = false;
  int64_t bias_rows = 1, bias_stride = 0;
};

// ---- parts of rows -------------------------------------------------------------------------------------------------

// A row is a sequence of adjacent parts of equal length. Rows follow one another where they have no stride.

// Part j of a row of `to` = sum over i of coefficients(j, i) times part i of that row of `from`.
struct CombinePartsProblem {
  int64_t parts = 0, to_parts = 0, length = 0;
  const void* from = nullptr;
  int64_t from_stride = 0;
  const void* coefficients = nullptr;  // acc, to_parts x parts
  void* to = nullptr;
};

// sums(j, i) = sum over rows of the dot product of part j of `of` with part i of `with`.
struct PartProductsProblem {
  int64_t of_parts = 0, parts = 0, length = 0;
  const void* of = nullptr;  // acc
  const void* with = nullptr;
  int64_t with_stride = 0;
  void* sums = nullptr;  // acc, of_parts x parts for each range of rows that is added up by itself
};

}  // namespace rf
