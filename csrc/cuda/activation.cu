// Activations on their own (the product's epilogue has them otherwise), their derivatives with the bias gradient's
// column sums, and squared error. Sums are taken in two kernels, a block's part and then all parts in order: no
// atomics, the same bits on every run.
#include <algorithm>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/activation.cuh"
#include "cuda/device/columns.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

// ---- one vector after the other ------------------------------------------------------------------------------------

template <class F>
__global__ void __launch_bounds__(tuning::kElementwiseThreads) elementwise_kernel(F f, int64_t vectors) {
  const int64_t v = (int64_t)blockIdx.x * tuning::kElementwiseThreads + threadIdx.x;
  if (v < vectors) f(v);
}

// Of n elements at x, where vectors lie at multiples of 16 bytes of x.
template <class T>
int64_t vector_count(const T* x, int64_t n) {
  return ceil_div(n + (int64_t)(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T)), kWidth<T>);
}

template <class F, class T>
void launch_elementwise(F f, const T* x, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t vectors = vector_count(x, n);
  launch(elementwise_kernel<F>, dim3((unsigned)ceil_div(vectors, tuning::kElementwiseThreads)),
         dim3(tuning::kElementwiseThreads), 0, stream, f, vectors);
}

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

template <class T>
struct SquaredErrorEach {
  const T *x, *y;
  T* each;
  int64_t n;

  __device__ void operator()(int64_t v) const {
    const int64_t j = first_vector(x, 1) + v * kWidth<T>;
    acc_t<T> a[kWidth<T>], b[kWidth<T>];
    widen(load_vec(x, 1, j, n, T()), a);
    widen(load_vec(y, 1, j, n, T()), b);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) a[i] = (a[i] - b[i]) * (a[i] - b[i]);
    store_vec(each, 1, j, n, narrowed_vec<T>(a));
  }
};

template <class T>
struct SquaredErrorBackward {
  const T *x, *y, *grad;
  T *dx, *dy;
  int64_t n;
  bool each_grad;
  acc_t<T> scale;

  __device__ void operator()(int64_t v) const {
    const int64_t j = first_vector(x, 1) + v * kWidth<T>;
    acc_t<T> a[kWidth<T>], b[kWidth<T>];
    widen(load_vec(x, 1, j, n, T()), a);
    widen(load_vec(y, 1, j, n, T()), b);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) a[i] -= b[i];
    if (each_grad) {
      widen(load_vec(grad, 1, j, n, T()), b);
    } else {
      const acc_t<T> shared = widen(*grad);
#pragma unroll
      for (acc_t<T>& g : b) g = shared;
    }
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) a[i] *= scale * b[i];
    if (dx) store_vec(dx, 1, j, n, narrowed_vec<T>(a));
#pragma unroll
    for (acc_t<T>& d : a) d = -d;
    if (dy) store_vec(dy, 1, j, n, narrowed_vec<T>(a));
  }
};

// ---- squared error, summed -----------------------------------------------------------------------------------------

// A thread's few squares are added in the accumulator's type, all further sums are double.
template <class T>
__global__ void __launch_bounds__(tuning::kSumThreads)
    squared_error_parts(const T* x, const T* y, double* parts, int64_t n) {
  __shared__ double scratch[kWarp];
  acc_t<T> sum = 0;
#pragma unroll
  for (int i = 0; i < tuning::kSumVectors; ++i) {
    const int64_t v = ((int64_t)blockIdx.x * tuning::kSumVectors + i) * tuning::kSumThreads + threadIdx.x;
    const int64_t j = first_vector(x, 1) + v * kWidth<T>;
    if (j >= n) break;
    acc_t<T> a[kWidth<T>], b[kWidth<T>];
    widen(load_vec(x, 1, j, n, T()), a);
    widen(load_vec(y, 1, j, n, T()), b);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) sum += (a[e] - b[e]) * (a[e] - b[e]);
  }
  const Sum<double> total = reduce_block(Sum<double>{(double)sum}, reinterpret_cast<Sum<double>*>(scratch));
  if (threadIdx.x == 0) parts[blockIdx.x] = total.sum;
}

template <class T>
__global__ void __launch_bounds__(tuning::kSumThreads)
    squared_error_total(const double* parts, int64_t count, double scale, T* total) {
  __shared__ double scratch[2 * kWarp];
  CompensatedSum mine;
  for (int64_t i = threadIdx.x; i < count; i += tuning::kSumThreads) mine.add(parts[i]);
  const CompensatedSum all = reduce_block(mine, reinterpret_cast<CompensatedSum*>(scratch));
  if (threadIdx.x == 0) *total = narrowed<T>((acc_t<T>)(all.value() * scale));
}

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
    activation_backward_kernel(ActivationBackward p, int64_t part_rows, acc_t<T>* parts) {
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

void launch_activation_backward(DType dtype, const ActivationBackward& args, cudaStream_t stream) {
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

// For the widest elements, which make the most parts.
int64_t squared_error_workspace(int64_t n) {
  return 8 * (1 + ceil_div(n + 1, kWidth<double> * tuning::kSumThreads * tuning::kSumVectors));
}

void launch_squared_error(DType dtype, const void* x, const void* y, void* each, void* total, double scale,
                          void* workspace, int64_t n, cudaStream_t stream) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (each) {
      launch_elementwise(SquaredErrorEach<T>{(const T*)x, (const T*)y, (T*)each, n}, (const T*)x, n, stream);
      return;
    }
    const int64_t parts = ceil_div(vector_count((const T*)x, n), tuning::kSumThreads * tuning::kSumVectors);
    if (parts > 0)
      launch(squared_error_parts<T>, dim3((unsigned)parts), dim3(tuning::kSumThreads), 0, stream, (const T*)x,
             (const T*)y, (double*)workspace, n);
    launch(squared_error_total<T>, dim3(1), dim3(tuning::kSumThreads), 0, stream, (const double*)workspace, parts,
           scale, (T*)total);
  });
}

void launch_squared_error_backward(DType dtype, const void* x, const void* y, const void* grad, bool each_grad,
                                   double scale, void* dx, void* dy, int64_t n, cudaStream_t stream) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    launch_elementwise(SquaredErrorBackward<T>{(const T*)x, (const T*)y, (const T*)grad, (T*)dx, (T*)dy, n, each_grad,
                                               (acc_t<T>)scale},
                       (const T*)x, n, stream);
  });
}

}  // namespace rf::cuda
