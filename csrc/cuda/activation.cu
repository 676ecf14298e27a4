// Activations on their own (the product's epilogue has them otherwise), and their derivatives with the bias gradient's
// column sums. Sums are taken in two kernels, a block's part and then all parts in order: no atomics, the same bits on
// every run.
#include <algorithm>

#include "cuda/device/activation.cuh"
#include "cuda/device/columns.cuh"
#include "cuda/device/elementwise.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

template <class T>
struct ActivationForward {
  const T* z;
  T* y;
  int64_t n;
  Activation activation;

  __device__ void operator()(int64_t v) const {
    const int64_t j = first_vector(z, 1) + v * kWidth<T>;
    acc_t<T> x[kWidth<T>];
    widen(load_vec(z, 1, j, n, T()), x);
    activate(activation, x);
    store_vec(y, 1, j, n, narrowed_vec<T>(x));
  }
};

// ---- an activation's derivative and column sums --------------------------------------------------------------------

// A vector of columns per thread and rows blockDim.y apart, of a part of the rows; the threads of a vector add their
// sums at the end.
template <class T>
struct ColumnSums {
  acc_t<T> sum[kWidth<T>] = {};
};
template <class T>
__device__ __forceinline__ void merge(ColumnSums<T>& into, const ColumnSums<T>& other) {
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) into.sum[i] += other.sum[i];
}

template <class T>
__global__ void __launch_bounds__(tuning::kElementwiseThreads,
                                  1)  // without the 1 it gets 64 registers, too few for float64
    activation_backward_kernel(ActivationRows p, int64_t part_rows, acc_t<T>* parts) {
  const int64_t column = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * kWidth<T>;
  const int64_t begin = (int64_t)blockIdx.y * part_rows, end = min(p.rows, begin + part_rows);
  ColumnSums<T> sums;
  if (column < p.columns)
    for (int64_t r = begin + threadIdx.y; r < end; r += blockDim.y) {
      const T* grad = (const T*)p.grad + p.grad_layout.offset(r);
      acc_t<T> g[kWidth<T>], s[kWidth<T>];
      widen(load_vec(grad, p.grad_layout.class_stride, column, p.columns, T()), g);
      if (p.activation != Activation::none) {
        widen(load_vec((const T*)p.saved + r * p.columns, 1, column, p.columns, T()), s);
        with_activation(p.activation, [&](auto is) {
#pragma unroll
          for (int i = 0; i < kWidth<T>; ++i) g[i] = through_activation<decltype(is)::value>(g[i], s[i]);
        });
      }
      if (p.output) store_vec((T*)p.output + r * p.columns, 1, column, p.columns, narrowed_vec<T>(g));
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) sums.sum[i] += g[i];
    }
  if (!p.column_sums) return;
  sums = reduce_columns(sums, ptx::dynamic_shared<ColumnSums<T>>());
  if (threadIdx.y != 0) return;
  for (int i = 0; i < kWidth<T> && column + i < p.columns; ++i)
    if (gridDim.y == 1)
      ((T*)p.column_sums)[column + i] = narrowed<T>(sums.sum[i]);
    else
      parts[(int64_t)blockIdx.y * p.columns + column + i] = sums.sum[i];
}

template <class T>
__global__ void __launch_bounds__(tuning::kElementwiseThreads)
    add_parts(const acc_t<T>* parts, int64_t count, int64_t columns, T* sums) {
  const int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  Sum<double> mine;
  if (column < columns)
    for (int64_t part = threadIdx.y; part < count; part += blockDim.y) mine.sum += parts[part * columns + column];
  const Sum<double> all = reduce_columns(mine, ptx::dynamic_shared<Sum<double>>());
  if (threadIdx.y == 0 && column < columns) sums[column] = narrowed<T>((acc_t<T>)all.sum);
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

void launch_activation_forward(DType dtype, const void* z, void* y, int64_t n, Activation activation,
                               cudaStream_t stream) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    launch_elementwise(ActivationForward<T>{(const T*)z, (T*)y, n, activation}, (const T*)z, n, stream);
  });
}

int64_t activation_backward_workspace(DType dtype, int64_t rows, int64_t columns) {
  if (columns == 0) return 0;
  const int64_t parts = divide(size_of(dtype), rows, columns).parts;
  return parts == 1 ? 0 : parts * columns * acc_size(dtype);
}

void launch_activation_backward(DType dtype, const ActivationRows& args, cudaStream_t stream) {
  if (args.columns == 0) return;
  const Division d = divide(size_of(dtype), args.rows, args.columns);
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t scratch = args.column_sums ? tuning::kElementwiseThreads * (int64_t)sizeof(ColumnSums<T>) : 0;
    launch(activation_backward_kernel<T>, d.grid(), d.block(), scratch, stream, args, d.part_rows,
           (acc_t<T>*)args.workspace);
    if (!args.column_sums || d.parts == 1) return;
    const dim3 adders(kWarp, tuning::kElementwiseThreads / kWarp);
    launch(add_parts<T>, dim3((unsigned)ceil_div(args.columns, kWarp)), adders,
           tuning::kElementwiseThreads * (int64_t)sizeof(Sum<double>), stream, (const acc_t<T>*)args.workspace, d.parts,
           args.columns, (T*)args.column_sums);
  });
}

}  // namespace rf::cuda
