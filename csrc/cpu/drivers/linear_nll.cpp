// Threads over rows of predictions, and over rows of linear models with few outputs.
#include <algorithm>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cpu/drivers/gemm_packed.h"
#include "cpu/platform.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

double in_order(const std::vector<double>& parts) {
  CompensatedSum sum;
  for (double p : parts) sum.add(p);
  return sum.value();
}

}  // namespace

double likelihood(DType observed, const LikelihoodArgs& args, void* predictions, int64_t rows, LikelihoodSums sums) {
  const auto kernel = kernels().likelihood[(int)observed];
  const DType acc = acc_dtype(observed);
  // Blocks by the shape alone, each with sums of its own: the same bits with any number of threads.
  const int64_t outputs = args.outputs, block = outputs == 1 ? tuning::kFewSumRows : tuning::kColumnSumRows,
                blocks = ceil_div(rows, block);
  const int64_t stride = (sums.bias ? outputs : 0) + (sums.variance ? outputs : 0), size = size_of(acc);
  char* partial = (char*)scratch(Slot::partial, blocks * stride * size);
  std::vector<double> losses(blocks);
  const int64_t grain = tuning::kParallelElements / (block * std::max<int64_t>(1, outputs)) + 1;
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      LikelihoodSums mine = sums;
      char* own = partial + b * stride * size;
      if (sums.bias) mine.bias = own;
      if (sums.variance) mine.variance = own + (sums.bias ? outputs * size : 0);
      kernel(args, predictions, b * block, std::min(rows, (b + 1) * block), &mine);
      losses[b] = mine.loss;
    }
  });
  add_parts(acc, partial, blocks, stride, outputs, sums.bias);
  add_parts(acc, partial + (sums.bias ? outputs * size : 0), blocks, stride, outputs, sums.variance);
  return in_order(losses);
}

bool few_outputs_fit(DType dtype, int64_t features, int64_t outputs) {
  return outputs <= tuning::kFewOutputs && outputs * features * acc_size(dtype) <= tuning::kFewSumBytes / 16;
}

double few_outputs(DType dtype, const FewOutputsArgs& args, int64_t rows, LikelihoodSums sums) {
  const auto kernel = kernels().few_outputs[(int)dtype];
  const DType acc = acc_dtype(dtype);
  const int64_t size = size_of(acc), outputs = args.likelihood.outputs, weights = outputs * args.features;
  // Of each part: the weight's gradient, the bias's and the variance's.
  const int64_t stride = weights + 2 * outputs, most = tuning::kFewSumBytes / (std::max<int64_t>(1, stride) * size);
  // By the shape alone too; kFewSumRows has the reasons for their size.
  const int64_t parts = std::max<int64_t>(1, std::min(most, ceil_div(rows, tuning::kFewSumRows)));
  char* partial = (char*)scratch(Slot::partial, parts * stride * size);
  std::vector<double> losses(parts);
  const double work = (double)rows * (double)(weights + outputs);
  const int64_t threads = std::min<int64_t>(thread_count(), 1 + (int64_t)(work / tuning::kParallelElements));
  const bool far = short_and_far(args.features * size_of(dtype), rows);
  take_tasks(parts, threads, [&](int64_t part) {
    const Range range = part_of(rows, tuning::kPassRows, part, parts);
    FewOutputsArgs mine = args;
    mine.x_is_far = far;
    LikelihoodSums own = sums;
    char* to = partial + part * stride * size;
    if (args.grad_weight) mine.grad_weight = to;
    if (sums.bias) own.bias = to + weights * size;
    if (sums.variance) own.variance = to + (weights + outputs) * size;
    kernel(mine, range.begin, range.end, &own);
    losses[part] = own.loss;
  });
  add_parts(acc, partial, parts, stride, weights, args.grad_weight);
  add_parts(acc, partial + weights * size, parts, stride, outputs, sums.bias);
  add_parts(acc, partial + (weights + outputs) * size, parts, stride, outputs, sums.variance);
  return in_order(losses);
}

}  // namespace rf
