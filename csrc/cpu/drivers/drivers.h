// Whole operations without torch: the work divided among threads, results combined in an order that does not depend on
// their number. Each is in the file that its section names.
#pragma once
#include <vector>

#include "cpu/isa/kernels.h"
#include "shared/compensated_sum.h"

namespace rf {

// ---- softmax.cpp ---------------------------------------------------------------------------------------------------

enum class SoftmaxOp { forward, backward, logsumexp_forward, logsumexp_backward };
void softmax(SoftmaxOp op, DType dtype, SoftmaxArgs args, int64_t rows);

// ---- cross_entropy.cpp ---------------------------------------------------------------------------------------------

// Sums over all rows. With bad_row >= 0 the outputs are undefined and nothing was read out of bounds.
CrossEntropyPartial cross_entropy_forward(DType dtype, CrossEntropyArgs args, const CrossEntropyOutputs& out,
                                          int64_t rows);
// What the losses' sum is divided by in a mean: the number of rows that are not ignored, or the sum of their classes'
// weights, or of probabilities that of all rows.
double cross_entropy_denominator(DType dtype, const CrossEntropyArgs& args, int64_t rows);
// The first row whose class is out of range, beside which nothing is computed, or -1.
int64_t cross_entropy_backward(DType dtype, CrossEntropyArgs args, CrossEntropyGrads grads, int64_t rows);
// Both of each block of rows, while it is in cache; the gradient may replace the logits. `weight` means nothing.
CrossEntropyPartial cross_entropy_forward_backward(DType dtype, CrossEntropyArgs args, const CrossEntropyOutputs& out,
                                                   CrossEntropyGrads grads, int64_t rows);

// ---- activation.cpp ------------------------------------------------------------------------------------------------

void activation_forward(DType dtype, const void* z, void* y, int64_t n, Activation activation);
void activation_backward(DType dtype, ActivationBackwardArgs args, int64_t rows);

// ---- column_sums.cpp -----------------------------------------------------------------------------------------------

// sums[j] = partial[0 * stride + j] + partial[1 * stride + j] + ... in double precision, all of type acc; or, with null
// sums, nothing.
void add_parts(DType acc, const void* partial, int64_t parts, int64_t stride, int64_t columns, void* sums);
// Sums of columns over parts that come one after another, of type acc: added to `totals`, and rounded in the end.
void add_to_totals(DType acc, const void* part, int64_t columns, CompensatedSum* totals);
void round_totals(DType acc, const CompensatedSum* totals, int64_t columns, void* sums);

// ---- mse_loss.cpp --------------------------------------------------------------------------------------------------

// Elements of an operand in the order in which results lie: adjacent where there are no runs, else an outermost one of
// runs of runs, each as many numbers of the next as its size and so far apart as its stride.
struct Run {
  int64_t size, stride;
};
struct Elements {
  const void* data;
  std::vector<Run> runs = {};
};
double mse_loss(DType dtype, const Elements& x, const Elements& y, void* each, int64_t n);
// grad: of each element, or one for all.
void mse_loss_backward(DType dtype, const Elements& x, const Elements& y, const Elements& grad, bool each_grad,
                       double scale, void* dx, void* dy, int64_t n);

// ---- linear_nll.cpp ------------------------------------------------------------------------------------------------

// Losses of predictions (acc, rows x outputs, replaced by their slopes where those are asked for), and sums: their own
// over all rows is returned, those of columns are written where `sums` points. `observed`: the type of targets, losses
// and upstream gradients.
double likelihood(DType observed, const LikelihoodArgs& args, void* predictions, int64_t rows, LikelihoodSums sums);
// The same for predictions of a linear model with few outputs, and the gradients of its operands. few_outputs_fit tells
// whether a model of that size is one.
bool few_outputs_fit(DType dtype, int64_t features, int64_t outputs);
double few_outputs(DType dtype, const FewOutputsArgs& args, int64_t rows, LikelihoodSums sums);

// ---- gemm.cpp, gemm_packed.cpp -------------------------------------------------------------------------------------

enum class GemmPath { packed, dot_few_columns, dot_few_rows, direct, lanes, lane_sums };
GemmPath gemm_path(DType dtype, const GemmProblem& g);
void gemm(DType dtype, GemmProblem g);
// Why a product of this type and shape is left to ATen's GEMM on this CPU, by tuning.h's table of measurements, or null
// where it is ours; `a_across`: A's memory has rows across K. REGFAST_GEMM=own or aten forces either side.
const char* gemm_by_aten(DType dtype, int64_t m, int64_t n, int64_t k, bool a_across = false);
// Whether those are that are large on each side.
inline bool large_gemm_by_aten(DType dtype) { return gemm_by_aten(dtype, 4096, 4096, 4096); }

// ---- sparse.cpp ----------------------------------------------------------------------------------------------------

// A matrix by the entries of its rows; values are of the accumulator's type.
struct SparseMatrix {
  std::vector<int64_t> row_begin;  // and the last one's end
  std::vector<int32_t> columns;
  std::vector<char> values;
};
// Entries of a matrix (acc) whose magnitude exceeds their row's bound. False, and nothing listed, if they are more than
// `most`.
bool list_large_entries(DType dtype, const void* matrix, int64_t rows, int64_t columns, const double* bounds,
                        int64_t most, SparseMatrix* to);
SparseMatrix transposed(DType dtype, const SparseMatrix& m, int64_t columns);
// C = A B, or added to it; C has the accumulator's type.
void sparse_product(DType dtype, const SparseMatrix& a, const MatrixView& b, int64_t columns, void* c, int64_t c_stride,
                    bool add);

// ---- phm_linear.cpp ------------------------------------------------------------------------------------------------

// Combinations of the parts of rows: from the dtype to its accumulator's type, or back.
void mix_parts(DType dtype, const CombinePartsProblem& args, int64_t rows);
void unmix_parts(DType dtype, const CombinePartsProblem& args, int64_t rows);
// Products of parts with parts, added to of_parts x parts sums.
void add_part_products(DType dtype, PartProductsProblem args, int64_t rows, double* sums);
// C = Z S^T with Z's rows `n` to each row of what it was mixed from; few of them are not worth packing S.
void phm_product(DType dtype, const GemmProblem& g, int64_t n);

}  // namespace rf
