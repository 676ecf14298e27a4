// The arguments of the kernels, beside those that shared/problems.h has for both devices and by its conventions.
#pragma once
#include "shared/problems.h"

namespace rf {

// ---- softmax family, cross-entropy ---------------------------------------------------------------------------------

struct SoftmaxArgs : SoftmaxProblem {
  int64_t rows = 0;  // of the call: how a row is taken depends on them, never on the range that it is in
  // acc: 3 * kTileRows * classes of them where a class_stride is not 1; else of a half type as many as classes, or
  // null where they are not kept.
  void* scratch = nullptr;
};

struct CrossEntropyArgs : CrossEntropyProblem {
  double class_weight_sum;  // of the class weights, with label smoothing; else of as many ones
  void* scratch;            // as SoftmaxArgs'
  // acc, exponentials_of_row for each row of a range, or null: forward leaves them there for the backward of that
  // range.
  void* exponentials;
};

struct CrossEntropyPartial {
  double loss, weight;  // sums of losses and of the denominators' terms over the range
  int64_t bad_row;      // a row whose class is out of range, or -1
};

struct CrossEntropyGrads : CrossEntropyBackward {
  double loss_scale;  // multiplies `loss`, which may be null
  bool stream;        // write grad_logits past the caches
};

// ---- activation ----------------------------------------------------------------------------------------------------

struct ActivationBackwardArgs : ActivationBackward {
  void* column_sums;  // acc, columns of them, overwritten; or null
};

// ---- likelihoods ---------------------------------------------------------------------------------------------------

// Losses of predictions and their derivatives: with w = row_weight, f = output_factor, g = grad * grad_scale,
//   gaussian   w (f (eta - y)^2 / 2 + constant)   its slope w g f (eta - y); f is 1 / variance
//   bernoulli  w ((1 - y) log(1 + exp(eta)) + f y log(1 + exp(-eta)))
//   poisson    w (exp(eta) - y eta)
// squared is gaussian with f = 2 and constant 0. Pointers to void are acc, but those that have a dtype of their own.
struct LikelihoodArgs : LikelihoodProblem {
  const void* output_factor;  // one per output; not read for poisson
  const void* constant;       // one per output, gaussian's; or null
  double grad_scale;
};
// Sums of a range of rows. Of columns: acc, overwritten, or null where not asked for; a variance's derivative is
// w g f (1 - f (eta - y)^2) / 2.
struct LikelihoodSums {
  bool value, slope;  // what is asked for: losses, gradients
  void *bias, *variance;
  double loss;
};

// All of a linear model with a few outputs in one pass over x.
struct FewOutputsArgs {
  const void* x;
  int64_t x_stride, features;  // between rows
  int64_t feature_stride = 1;  // 1 where there are more than tile_features of the kernels
  bool x_is_far;               // as many_are_far of DotArgs
  const void* weight;          // outputs x features, contiguous
  const void* bias;            // acc, one per output, or null
  LikelihoodArgs likelihood;
  void* grad_weight;  // acc, outputs x features, overwritten; or null
  void* grad_x;       // rows x features, or null
  bool wide_grad_x;   // of type acc
};

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// What happens to a tile of C = A B once its products are summed. C, pre-activation and bias have the entry's dtype.
struct Epilogue {
  void* c;
  int64_t c_stride;         // between rows; columns are adjacent
  void* partial = nullptr;  // acc, sums of the K blocks before the last; may be c itself
  int64_t partial_stride = 0;
  const void* bias;  // one per column, or null
  Activation activation;
  void* preactivation;  // laid out as c, or null
  // Rows of C take turns in so many rows of biases, bias_stride apart.
  int64_t bias_rows = 1, bias_stride = 0;
};

// Rows of memory, their distance and length in bytes.
struct Region {
  const void* from;
  int64_t rows, stride, bytes;
};

// A block of C, or of C transposed: rows of A times panels of B.
struct GemmBlockArgs {
  const void* a;  // acc
  // Element (i, k) of A's tile t is a[t * a_panel + i * a_row + k * a_k]; of a K in steps (PairKernels), the first of
  // those that lie side by side.
  int64_t a_row, a_k, a_panel;
  const void* b;                // acc, ceil(b_count / NR) packed panels of [k][NR]
  int64_t a_count, b_count, k;  // of this block; k of this K block
  bool b_is_far;    // beyond L2: each panel's next chain is asked for early, which brings 12% there and costs 2% within
  Region next;      // is asked for meanwhile
  int64_t chain;    // products of a K block that are added up before they join the rest
  bool transposed;  // A's rows are C's columns
  void* tiles;      // acc, scratch of a_count * b_count, rounded up to MR and NR
  bool continues, continued;  // tiles hold sums of the K block before; they wait for the next one, and C is left alone
  int64_t a_index, b_index;   // of the block in C
  bool first, last;           // K block: nothing to add to, or the epilogue is due
  Epilogue epilogue;
};

// A part of an operand of a product: its element (i, k) is from(i, k), or from(k, i) where its rows lie across k.
struct PackArgs {
  MatrixView from;
  bool across;
  int64_t i0, count;
  int64_t k0, k;
  void* to;  // acc: panels of [k][MR] or [k][NR] one behind another, padded with zeros; or widened rows of k
};

// Products of a few rows with many, both read where they lie, adjacent along K.
struct DotArgs {
  MatrixView many, few;  // col_stride 1
  int64_t begin, end;    // range of many's rows
  int64_t few_rows, k;
  bool many_are_columns;  // of C: few rows of X against all of W; else X's rows against few of W
  bool many_are_far;      // in memory, and short: they are read in order first
  Epilogue epilogue;
};

// C(m, n) = sum over k of A(m, k) B(k, n) with B's rows adjacent along n and read in place: few rows or a small K. A is
// of the entry's accumulator type.
struct DirectArgs {
  const void* a;  // acc, element (i, k) at i * a_row + k * a_k
  int64_t a_row, a_k;
  const void* b;  // row k at k * b_k
  int64_t b_k, k;
  bool b_is_far;                                         // beyond the L2 of a few cores
  int64_t row_begin, row_end, column_begin, column_end;  // the part of C to compute; kSkinny rows unless K is
  Epilogue epilogue;
};

// Products of many rows with two sides of at most kFewSides. gemm_lanes: rows of A
// (class_stride along K) and of C; B's element (k, j) at j * outer_stride + k * class_stride. gemm_lane_sums: rows of A
// (k of them across) and of B (n across), summed over; no epilogue.
struct LanesArgs {
  const void* a;
  RowLayout a_layout;
  const void* b;
  RowLayout b_layout;
  int64_t n, k;
  Epilogue epilogue;
};

// ---- sparse gradients ----------------------------------------------------------------------------------------------

// One row of C = A B, A's row given by its entries: c[j] = sum over them of value * b[row * b_row + j].
struct SparseRow {
  const int32_t* rows;  // of B
  const void* values;   // acc
  int64_t entries;
  const void* b;
  int64_t b_row, columns;
  void* c;   // acc
  bool add;  // to what is there
};

}  // namespace rf
