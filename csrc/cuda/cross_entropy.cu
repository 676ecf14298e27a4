// Cross-entropy: losses and statistics of rows, gradients from them, or both from one read of the logits; then the
// rows' losses and denominators added up in double precision, in an order that depends on their number alone.
#include "cuda/device/cross_entropy_program.cuh"
#include "cuda/launch.h"

namespace rf::cuda {
namespace {

// ---- sums over the rows --------------------------------------------------------------------------------------------

struct Totals {
  CompensatedSum loss, weight;
};
__device__ __forceinline__ void merge(Totals& into, const Totals& other) {
  merge(into.loss, other.loss);
  merge(into.weight, other.weight);
}

struct TotalArgs {
  int64_t rows;
  const int64_t* target;  // null: every row has weight 1
  const void* class_weight;
  int64_t classes, ignore_index;
  const void* loss;  // one per row, or null
  Totals* partial;   // one per block, where there is more than one
  void* total;       // or null
  DType total_dtype;
  bool mean;
  double* weight_sum;  // or null
};

__device__ void store_total(const TotalArgs& a, const Totals& t) {
  if (a.weight_sum) *a.weight_sum = t.weight.value();
  if (!a.total) return;
  double value = t.loss.value();
  if (a.mean) {
    const double weights = t.weight.value();
    value = weights == 0 ? (double)NAN : value / weights;  // see mean_of
  }
  // Rounded once, from double.
  switch (a.total_dtype) {
    case DType::f32:
      *(float*)a.total = (float)value;
      break;
    case DType::f64:
      *(double*)a.total = value;
      break;
    case DType::bf16:
      *(__nv_bfloat16*)a.total = narrowed<__nv_bfloat16>((float)value);
      break;
    case DType::f16:
      *(__half*)a.total = narrowed<__half>((float)value);
      break;
  }
}

// Rows first + thread, first + thread + threads, ... of each block's share; A is the losses' and weights' type.
template <class A>
__global__ void __launch_bounds__(tuning::kTotalThreads) total_of_rows(TotalArgs a) {
  // Blocks by the number of rows alone, never by the device's size: the same bits on every GPU.
  const int64_t share = ceil_div(a.rows, gridDim.x), begin = blockIdx.x * share;
  const int64_t end = begin + share < a.rows ? begin + share : a.rows;
  Totals t;
  for (int64_t r = begin + threadIdx.x; r < end; r += blockDim.x) {
    if (a.loss) t.loss.add(((const A*)a.loss)[r]);
    const int64_t y = a.target ? a.target[r] : 0;
    // A class that is none has no weight to be read.
    if (!a.target)
      t.weight.add(1);
    else if (y != a.ignore_index && 0 <= y && y < a.classes)
      t.weight.add(a.class_weight ? (double)((const A*)a.class_weight)[y] : 1.0);
  }
  // Compensated sums are merged with what they have put aside.
  t = reduce_block(t, ptx::dynamic_shared<Totals>());
  if (threadIdx.x != 0) return;
  // Few rows need one kernel only: a second launch would take longer than their sum.
  if (gridDim.x > 1)
    a.partial[blockIdx.x] = t;
  else
    store_total(a, t);
}

__global__ void __launch_bounds__(tuning::kTotalThreads) total_of_blocks(TotalArgs a, int64_t blocks) {
  Totals t;
  for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) merge(t, a.partial[b]);
  t = reduce_block(t, ptx::dynamic_shared<Totals>());
  if (threadIdx.x == 0) store_total(a, t);
}

int64_t total_blocks(int64_t rows) {
  return std::min<int64_t>(std::max<int64_t>(1, ceil_div(rows, tuning::kTotalRows)), tuning::kTotalThreads);
}

template <class A>
void launch_total(const CrossEntropyRows& a, const CrossEntropyResults& out, bool losses, cudaStream_t stream) {
  const TotalArgs t = {a.rows,
                       a.target,
                       a.class_weight,
                       a.classes,
                       a.ignore_index,
                       losses ? out.loss : nullptr,
                       (Totals*)out.workspace,
                       losses ? out.total : nullptr,
                       out.total_dtype,
                       out.mean,
                       out.weight_sum};
  const int64_t blocks = total_blocks(a.rows), shared = kWarp * (int64_t)sizeof(Totals);
  launch(total_of_rows<A>, dim3((unsigned)blocks), dim3(tuning::kTotalThreads), shared, stream, t);
  if (blocks > 1) launch(total_of_blocks, dim3(1), dim3(tuning::kTotalThreads), shared, stream, t, blocks);
}

// ---- rows ----------------------------------------------------------------------------------------------------------

void run(DType dtype, const CrossEntropyRows& a, const CrossEntropyResults& out, const CrossEntropyUpstream& up,
         bool reduces, bool emits, cudaStream_t stream) {
  // The common options have an instance of their own, without the registers that the others need.
  const bool plain = a.target && a.label_smoothing == 0 && a.logit_scale == 1 && a.softcap == 0 && !out.argmax &&
                     (reduces ? !a.row_entropy : !up.entropy);
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (plain)
      run_rows(CrossEntropyProgram<T, true>(a, out, up, reduces, emits), a.logits, a.layout, stream);
    else
      run_rows(CrossEntropyProgram<T, false>(a, out, up, reduces, emits), a.logits, a.layout, stream);
  });
}

void run_total(DType dtype, const CrossEntropyRows& a, const CrossEntropyResults& out, bool losses,
               cudaStream_t stream) {
  if (dtype == DType::f64)
    launch_total<double>(a, out, losses, stream);
  else
    launch_total<float>(a, out, losses, stream);
}

}  // namespace

int64_t cross_entropy_workspace(int64_t rows) { return total_blocks(rows) * (int64_t)sizeof(Totals); }

void launch_cross_entropy_forward(DType dtype, const CrossEntropyRows& a, const CrossEntropyResults& out,
                                  cudaStream_t stream) {
  run(dtype, a, out, {}, true, false, stream);
  if (out.total || out.weight_sum) run_total(dtype, a, out, true, stream);
}

void launch_cross_entropy_backward(DType dtype, const CrossEntropyRows& a, const CrossEntropyUpstream& up,
                                   cudaStream_t stream) {
  run(dtype, a, {}, up, false, true, stream);
}

// The mean's denominator depends on the targets alone, so it is there before the rows are read.
void launch_cross_entropy_forward_backward(DType dtype, const CrossEntropyRows& a, const CrossEntropyResults& out,
                                           void* grad_logits, const RowLayout& grad_layout, cudaStream_t stream,
                                           double upstream) {
  CrossEntropyUpstream up = {};
  up.of_total = upstream;
  up.grad_logits = grad_logits;
  up.grad_layout = grad_layout;
  if (out.mean) {
    run_total(dtype, a, out, false, stream);
    up.weight_sum = out.weight_sum;
  }
  run(dtype, a, out, up, true, true, stream);
  run_total(dtype, a, out, true, stream);
}

}  // namespace rf::cuda
