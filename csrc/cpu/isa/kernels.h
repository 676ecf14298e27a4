// The table of kernels: one per ISA, one entry per dtype. Every kernel is single-threaded, works on the range it is
// given, allocates nothing and touches nothing outside of its arguments; a signature is its contract.
#pragma once
#include "cpu/kernels/arguments.h"

namespace rf {

// The GEMM engine's for pairs of bf16: of operands or a C of bf16 and of float. Packing is told numbers of K and writes
// slots of two.
struct PairKernels {
  int64_t mr, nr;  // register tile
  // Slots of K that the micro-kernel takes at a time, of which K is made up by zeros. Of A that is not read in place,
  // so many of each row of a register tile lie side by side, then the next. 0: any K; of A rows along K, others as
  // panels.
  int64_t step;
  int64_t chain, rows, columns;  // as tuning's kGemmChain, kBlockRows and kGroupColumns
  void (*pack_a[2])(const PackArgs&);
  void (*pack_b[2])(const PackArgs&);
  void (*lay_out_a[2])(const PackArgs&);  // of rows along k, adjacent along it
  void (*gemm_block[2])(const GemmBlockArgs&);
  void (*gemm_dot)(const DotArgs&);
};

struct Kernels {
  const char* isa;
  int64_t lanes[kDTypes];            // of a vector of the accumulator's type
  int64_t mr[kDTypes], nr[kDTypes];  // register tile of the GEMM
  int64_t tile_features[kDTypes];    // up to so many features few_outputs reads in place where they lie apart

  void (*softmax_forward[kDTypes])(const SoftmaxArgs&, int64_t row_begin, int64_t row_end);
  void (*softmax_backward[kDTypes])(const SoftmaxArgs&, int64_t row_begin, int64_t row_end);
  void (*logsumexp_forward[kDTypes])(const SoftmaxArgs&, int64_t row_begin, int64_t row_end);
  void (*logsumexp_backward[kDTypes])(const SoftmaxArgs&, int64_t row_begin, int64_t row_end);

  CrossEntropyPartial (*cross_entropy_forward[kDTypes])(const CrossEntropyArgs&, const CrossEntropyOutputs&,
                                                        int64_t row_begin, int64_t row_end);
  // Returns a row whose class is out of range, or -1.
  int64_t (*cross_entropy_backward[kDTypes])(const CrossEntropyArgs&, const CrossEntropyGrads&, int64_t row_begin,
                                             int64_t row_end);
  // Both of a range; row statistics are stored too. A mean's denominator its caller knows: `weight` means nothing.
  CrossEntropyPartial (*cross_entropy_forward_backward[kDTypes])(const CrossEntropyArgs&, const CrossEntropyOutputs&,
                                                                 const CrossEntropyGrads&, int64_t row_begin,
                                                                 int64_t row_end);

  void (*activation_forward[kDTypes])(const void* z, void* y, int64_t n, Activation);
  void (*activation_backward[kDTypes])(const ActivationBackwardArgs&, int64_t row_begin, int64_t row_end);
  double (*mse_loss[kDTypes])(const void* x, const void* y, void* each, int64_t n);  // each may be null
  // dx = scale * g * (x - y), dy = -dx, either may be null; g is one number or, with each_grad, n of them
  void (*mse_loss_backward[kDTypes])(const void* x, const void* y, const void* grad, bool each_grad, double scale,
                                     void* dx, void* dy, int64_t n);

  // Predictions of a range of rows (acc, rows x outputs), replaced by their slopes where those are asked for.
  void (*likelihood[kDTypes])(const LikelihoodArgs&, void* eta, int64_t row_begin, int64_t row_end, LikelihoodSums*);
  void (*few_outputs[kDTypes])(const FewOutputsArgs&, int64_t row_begin, int64_t row_end, LikelihoodSums*);

  void (*pack_a[kDTypes])(const PackArgs&);
  void (*pack_b[kDTypes])(const PackArgs&);
  void (*widen_a[kDTypes])(const PackArgs&);  // rows along k, adjacent along it
  void (*gemm_block[kDTypes])(const GemmBlockArgs&);
  void (*gemm_dot[kDTypes])(const DotArgs&);
  void (*gemm_direct[kDTypes])(const DirectArgs&);
  void (*gemm_lanes[kDTypes])(const LanesArgs&, int64_t row_begin, int64_t row_end);
  void (*gemm_lane_sums[kDTypes])(const LanesArgs&, int64_t row_begin, int64_t row_end, void* sums);  // acc, k x n

  // Entries of a row (acc) whose magnitude exceeds the bound: how many, and which.
  int64_t (*count_entries[kDTypes])(const void* row, int64_t n, double bound);
  void (*list_entries[kDTypes])(const void* row, int64_t n, double bound, int32_t* columns, void* values);
  void (*sparse_row_product[kDTypes])(const SparseRow&);

  void (*mix_parts[kDTypes])(const CombinePartsProblem&, int64_t row_begin, int64_t row_end);    // to acc
  void (*unmix_parts[kDTypes])(const CombinePartsProblem&, int64_t row_begin, int64_t row_end);  // from acc
  void (*part_products[kDTypes])(const PartProductsProblem&, int64_t row_begin, int64_t row_end);

  double (*fma_gflops)(double seconds);  // this core's float32 peak, measured for about so long

  const PairKernels* pairs;  // or null
};

// The table in use, chosen once: REGFAST_ISA, else the best that the CPU runs.
const Kernels& kernels();
// The tables that were built and run on this CPU, best first; ends with null.
const Kernels* const* available_kernels();

}  // namespace rf
