// What csrc/cuda/ops.cpp calls: launchers of the kernels in the .cu files, each queued on `stream` of the current device.
// Raw pointers to device memory, sizes in int64_t, no torch. Pointers to void point to elements of `dtype`; "acc" means
// acc_t of it. No alignment beyond the element's is assumed. A launch that fails throws std::runtime_error; nothing here
// waits for the device.
#pragma once
#include <cuda_runtime.h>

#include "../cpu/types.h"

namespace rf::cuda {

// ---- elementwise ---------------------------------------------------------------------------------------------------

// y = activation(z), n elements; y may be z.
void launch_activation_forward(DType dtype, const void* z, void* y, int64_t n, Activation activation,
                               cudaStream_t stream);

struct ActivationBackward {  // dz = dy * act'(saved), rows x columns
  const void *grad, *saved;  // saved: the forward's output or pre-activation, contiguous; null for none
  RowLayout grad_layout;     // class_stride: between columns
  void* output;              // dz, contiguous, or null: only the column sums are wanted
  int64_t rows, columns;
  Activation activation;
  void* column_sums;  // of dz before it is rounded, of `dtype`; or null
  void* workspace;    // activation_backward_workspace bytes, or null when there are no column sums
};
int64_t activation_backward_workspace(DType dtype, int64_t rows, int64_t columns);
void launch_activation_backward(DType dtype, const ActivationBackward& args, cudaStream_t stream);

// each = (x - y)^2, n elements; or, with `total`, their sum times scale, one element of `dtype`. One of the two is null.
int64_t squared_error_workspace(int64_t n);
void launch_squared_error(DType dtype, const void* x, const void* y, void* each, void* total, double scale,
                          void* workspace, int64_t n, cudaStream_t stream);
// dx = scale * g * (x - y), dy = -dx, either may be null; g is one number or, with each_grad, n of them.
void launch_squared_error_backward(DType dtype, const void* x, const void* y, const void* grad, bool each_grad,
                                   double scale, void* dx, void* dy, int64_t n, cudaStream_t stream);

// ---- softmax family, cross-entropy ---------------------------------------------------------------------------------

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// C = op(A) op(B) with an epilogue, as csrc/cpu/drivers.h has it: all strides of A and B, C's columns adjacent.
struct Gemm {
  int64_t m, n, k;
  MatrixView a;  // a(i, k), or a(k, i) where transposed
  bool a_transposed;
  MatrixView b;  // b(k, j), or b(j, k) where transposed, as in X W^T
  bool b_transposed;
  void* c;
  int64_t c_stride;
  const void* bias;  // n of `dtype`, or null
  Activation activation;
  void* preactivation;  // laid out as c, or null
  void* workspace;      // gemm_workspace bytes
};
// tf32: whether float32 may be multiplied in tf32; no meaning for other types.
int64_t gemm_workspace(DType dtype, bool tf32, const Gemm& gemm);
void launch_gemm(DType dtype, bool tf32, const Gemm& gemm, cudaStream_t stream);
// Whether a product is left to ATen's GEMM (and its epilogue to launch_activation_forward) on the current device, by
// tuning.h's table; REGFAST_CUDA_GEMM=own or aten forces either side.
bool gemm_by_aten(DType dtype, bool tf32, int64_t m, int64_t n, int64_t k);

}  // namespace rf::cuda
