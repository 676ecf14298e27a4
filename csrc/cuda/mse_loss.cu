// Squared error and its gradients. A sum is taken in two kernels, a block's part and then all parts in order: no
// atomics, the same bits on every run.
#include "cuda/device/elementwise.cuh"
#include "cuda/device/launch_kernel.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/vec128.cuh"
#include "cuda/launch.h"
#include "cuda/tuning.h"

namespace rf::cuda {
namespace {

// ---- one vector after the other ------------------------------------------------------------------------------------

template <class T>
struct MseLossEach {
  const T *x, *y;
  T* each;
  int64_t n;

  __device__ void operator()(int64_t v) const {
    const int64_t j = first_vector(x, 1) + v * kWidth<T>;
    acc_t<T> a[kWidth<T>], b[kWidth<T>];
    // Vectors begin where x's do in memory; y may lie otherwise, which load_vec sees.
    widen(load_vec(x, 1, j, n, T()), a);
    widen(load_vec(y, 1, j, n, T()), b);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) a[i] = (a[i] - b[i]) * (a[i] - b[i]);
    store_vec(each, 1, j, n, narrowed_vec<T>(a));
  }
};

template <class T>
struct MseLossBackward {
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
      // One number for all, read on the device: asking for it on the host would wait for all work before.
      const acc_t<T> shared = widen(*grad);
#pragma unroll
      for (acc_t<T>& g : b) g = shared;
    }
    // The gradients of x and y differ in sign alone: one difference for both.
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
    mse_loss_parts(const T* x, const T* y, double* parts, int64_t n) {
  __shared__ double scratch[kWarp];
  acc_t<T> sum = 0;
#pragma unroll
  for (int i = 0; i < tuning::kSumVectors; ++i) {
    const int64_t v = ((int64_t)blockIdx.x * tuning::kSumVectors + i) * tuning::kSumThreads + threadIdx.x;
    const int64_t j = first_vector(x, 1) + v * kWidth<T>;
    // Further vectors of this thread lie further on.
    if (j >= n) break;
    acc_t<T> a[kWidth<T>], b[kWidth<T>];
    widen(load_vec(x, 1, j, n, T()), a);
    widen(load_vec(y, 1, j, n, T()), b);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) sum += (a[e] - b[e]) * (a[e] - b[e]);
  }
  // In double from here on: a block has thousands of squares, all blocks millions.
  const Sum<double> total = reduce_block(Sum<double>{(double)sum}, reinterpret_cast<Sum<double>*>(scratch));
  if (threadIdx.x == 0) parts[blockIdx.x] = total.sum;
}

template <class T>
__global__ void __launch_bounds__(tuning::kSumThreads)
    mse_loss_total(const double* parts, int64_t count, double scale, T* total) {
  __shared__ double scratch[2 * kWarp];
  CompensatedSum mine;
  // Compensated (Neumaier), since parts are many, and one thread adds up a whole column of them.
  for (int64_t i = threadIdx.x; i < count; i += tuning::kSumThreads) mine.add(parts[i]);
  const CompensatedSum all = reduce_block(mine, reinterpret_cast<CompensatedSum*>(scratch));
  if (threadIdx.x == 0) *total = narrowed<T>((acc_t<T>)(all.value() * scale));
}

}  // namespace

// ---- launchers -----------------------------------------------------------------------------------------------------

// For the widest elements, which make the most parts.
int64_t mse_loss_workspace(int64_t n) {
  return 8 * (1 + ceil_div(n + 1, kWidth<double> * tuning::kSumThreads * tuning::kSumVectors));
}

void launch_mse_loss(DType dtype, const void* x, const void* y, void* each, void* total, double scale, void* workspace,
                     int64_t n, cudaStream_t stream) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (each) {
      launch_elementwise(MseLossEach<T>{(const T*)x, (const T*)y, (T*)each, n}, (const T*)x, n, stream);
      return;
    }
    const int64_t parts = ceil_div(vector_count((const T*)x, n), tuning::kSumThreads * tuning::kSumVectors);
    // Without elements the total is 0 (or 0 / 0), which the second kernel writes by itself.
    if (parts > 0)
      launch(mse_loss_parts<T>, dim3((unsigned)parts), dim3(tuning::kSumThreads), 0, stream, (const T*)x, (const T*)y,
             (double*)workspace, n);
    launch(mse_loss_total<T>, dim3(1), dim3(tuning::kSumThreads), 0, stream, (const double*)workspace, parts, scale,
           (T*)total);
  });
}

void launch_mse_loss_backward(DType dtype, const void* x, const void* y, const void* grad, bool each_grad, double scale,
                              void* dx, void* dy, int64_t n, cudaStream_t stream) {
  with_type(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    launch_elementwise(
        MseLossBackward<T>{(const T*)x, (const T*)y, (const T*)grad, (T*)dx, (T*)dy, n, each_grad, (acc_t<T>)scale},
        (const T*)x, n, stream);
  });
}

}  // namespace rf::cuda
