// Negative log-likelihoods of linear models: a prediction becomes its loss and the loss's derivative, with the sums of
// both that are wanted. A block has its own sums, for the caller to add up over all blocks of all chunks: no atomics,
// the same bits on every run.
#include "cuda/device/columns.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/math.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

constexpr double kLogTwoPi = 1.8378770664093454836;

// One output's loss and derivatives, of elements of type T.
template <Family family, class T>
struct Output {
  using A = acc_t<T>;
  A scale;     // gaussian: 1 / variance; bernoulli: weight of positives
  A constant;  // gaussian: the loss where nothing is left over

  struct Loss {
    A value, slope, of_scale;
  };

  __device__ void set(A given, bool full) {
    // Once for a column: rows then multiply.
    scale = family == Family::gaussian ? A(1) / given : given;
    if constexpr (family == Family::gaussian) constant = A(0.5) * log_of(given) + (full ? A(0.5 * kLogTwoPi) : A(0));
  }

  __device__ Loss at(A eta, A y, bool full) const {
    if constexpr (family == Family::bernoulli) {
      // exp(-abs(eta)), so that all is finite, and both sigmoids are quotients without a difference.
      const A e = exp_of<T>(eta < A(0) ? eta : -eta), near = A(1) / (A(1) + e), far = e * near;
      const A positive = scale * y, negative = A(1) - y;
      const A loss = negative * max_of(eta, A(0)) + positive * max_of(-eta, A(0)) + (negative + positive) * log1p_of(e);
      return {loss, eta < A(0) ? negative * far - positive * near : negative * near - positive * far, A(0)};
    } else if constexpr (family == Family::poisson) {
      // Beyond the range it is infinite, as torch's.
      const A mean = exp_of<T>(eta);
      A loss = mean - y * eta;
      if (full && y > A(1)) loss += y * (log_of(y) - A(1)) + A(0.5) * (log_of(y) + A(kLogTwoPi));  // Stirling's log y!
      return {loss, mean - y, A(0)};
    } else if constexpr (family == Family::gaussian) {
      // What is left over is the loss's square, the slope and, squared, the scale's gradient.
      const A r = eta - y, slope = scale * r;
      return {A(0.5) * slope * r + constant, slope, A(0.5) * (scale - slope * slope)};
    } else {
      const A r = eta - y;
      return {r * r, A(2) * r, A(0)};
    }
  }
};

template <Family family, class T>
struct Sums {
  // The other families' scale is no parameter that has a gradient by columns: one number that is never touched.
  static constexpr int kScales = family == Family::gaussian ? kWidth<T> : 1;
  acc_t<T> bias[kWidth<T>] = {}, scale[kScales] = {};
  double loss = 0;
};
template <Family family, class T>
__device__ __forceinline__ void merge(Sums<family, T>& into, const Sums<family, T>& other) {
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) into.bias[i] += other.bias[i];
#pragma unroll
  for (int i = 0; i < into.kScales; ++i) into.scale[i] += other.scale[i];
  into.loss += other.loss;
}

template <Family family, class T>
__global__ void __launch_bounds__(tuning::kElementwiseThreads, 1) likelihood_kernel(Likelihood p, int64_t part_rows) {
  using A = acc_t<T>;
  constexpr int kW = kWidth<T>;
  // Threads along x have adjacent columns, along y rows: a column's parameters are loaded once for all of its rows.
  const int64_t column = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kW;
  const int64_t begin = (int64_t)blockIdx.y * part_rows, end = min(p.rows, begin + part_rows);
  // 0 of threads beyond the last column: they stay for the block's sums.
  const int columns = (int)max((int64_t)0, min((int64_t)kW, p.outputs - column));
  const A factor = A(p.factor), number = family == Family::gaussian ? A(p.variance) : A(1);
  Output<family, T> output[kW];
  A bias[kW] = {};
#pragma unroll
  for (int i = 0; i < kW; ++i) {
    output[i].set(p.scale && i < columns ? ((const A*)p.scale)[column + i] : number, p.full);
    if (p.bias && i < columns) bias[i] = widen(((const T*)p.bias)[column + i]);
  }
  Sums<family, T> sums;
  // Every thread its rows in order: sums do not depend on who is faster.
  for (int64_t r = begin + threadIdx.y; r < end && columns > 0; r += blockDim.y) {
    const int64_t start = r * p.outputs;
    A x[kW], y[kW], up[kW];
    load_vecs((const A*)p.product + start, column, p.outputs, x);
    // A target of a half type is not widened in memory: that would be three times its bytes.
    if (p.target_is_acc)
      load_vecs((const A*)p.target + start, column, p.outputs, y);
    else
      widen(load_vec((const T*)p.target + start, 1, column, p.outputs, T()), y);
    if (p.grad) load_vecs((const A*)p.grad + start, column, p.outputs, up);
    const A of_row = p.row_weight ? factor * ((const A*)p.row_weight)[r] : factor;
    A loss = A(0);
#pragma unroll
    for (int i = 0; i < kW; ++i) {
      // Elements beyond the last column would join its row's loss.
      if (i >= columns) continue;
      const auto at = output[i].at(x[i] + bias[i], y[i], p.full);
      const A of_gradient = p.grad ? of_row * up[i] : of_row;
      // Loss and slope stay in the registers of what they come from.
      y[i] = of_row * at.value;
      x[i] = of_gradient * at.slope;
      loss += y[i];
      sums.bias[i] += x[i];
      if constexpr (family == Family::gaussian) sums.scale[i] += of_gradient * at.of_scale;
    }
    if (p.loss) store_vecs((A*)p.loss + start, column, p.outputs, y);
    if (p.gradient) store_vec((T*)p.gradient + start, 1, column, p.outputs, narrowed_vec<T>(x));
    // A row's few losses in the accumulator's type, rows in double: a mean of millions keeps its digits.
    sums.loss += (double)loss;
  }
  // The same for all threads, so that no barrier below waits for one that has left.
  if (!p.loss_sums && !p.bias_sums && !p.scale_sums) return;
  // Down the columns first, then across them: bias and scale want the former, the loss both.
  sums = reduce_columns(sums, ptx::dynamic_shared<Sums<family, T>>());
  const double loss = reduce_lanes(Sum<double>{sums.loss}, blockDim.x).sum;
  if (threadIdx.y != 0) return;
  if (threadIdx.x == 0 && p.loss_sums) p.loss_sums[(int64_t)blockIdx.y * gridDim.x + blockIdx.x] = loss;
  for (int i = 0; i < columns; ++i) {
    const int64_t at = (int64_t)blockIdx.y * p.outputs + column + i;
    if (p.bias_sums) ((A*)p.bias_sums)[at] = sums.bias[i];
    if constexpr (family == Family::gaussian)
      if (p.scale_sums) ((A*)p.scale_sums)[at] = sums.scale[i];
  }
}

template <Family f>
struct FamilyIs {
  static constexpr Family value = f;
};
template <class F>
void with_family(Family family, F&& f) {
  switch (family) {
#define RF_CASE(name) \
  case Family::name:  \
    return f(FamilyIs<Family::name>());
    RF_EACH_FAMILY(RF_CASE)
#undef RF_CASE
  }
}

}  // namespace

// ---- launcher ------------------------------------------------------------------------------------------------------

int64_t likelihood_parts(DType dtype, int64_t rows, int64_t outputs) {
  return rows * outputs == 0 ? 0 : divide(size_of(dtype), rows, outputs).parts;
}

int64_t likelihood_blocks(DType dtype, int64_t rows, int64_t outputs) {
  return rows * outputs == 0 ? 0
                             : divide(size_of(dtype), rows, outputs).panels * likelihood_parts(dtype, rows, outputs);
}

void launch_likelihood(DType dtype, const Likelihood& args, cudaStream_t stream) {
  if (args.rows * args.outputs == 0) return;
  const Division d = divide(size_of(dtype), args.rows, args.outputs);
  with_type(dtype, [&](auto t) {
    with_family(args.family, [&](auto family) {
      using T = typename decltype(t)::type;
      constexpr Family kFamily = decltype(family)::value;
      // Families are instances: a branch for each element would cost more than some of them take.
      launch(likelihood_kernel<kFamily, T>, d.grid(), d.block(),
             tuning::kElementwiseThreads * (int64_t)sizeof(Sums<kFamily, T>), stream, args, d.part_rows);
    });
  });
}

}  // namespace rf::cuda
