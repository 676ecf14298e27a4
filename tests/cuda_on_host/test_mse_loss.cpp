// Squared error and its gradients on CUDA, against double precision.
#include <algorithm>

#include "cuda/launch.h"
#include "device_memory.h"
#include "mse_loss_cases.h"

namespace test {
namespace {

struct Cuda {
  using Memory = LentMemory;
  static constexpr double kScale = 1.0 / 3;  // of the sum, which is rounded to its elements' type

  static double sum_units(int64_t n) { return sum_error(std::min<int64_t>(n, 64)); }
  template <class T>
  static double sum_rounding() {
    return std::ldexp(1.001, -Format<T>::digits);
  }
  template <class T>
  static double forward(const T* x, const T* y, T* each, int64_t n) {
    using namespace rf::cuda;
    if (each) launch_mse_loss(Format<T>::dtype, x, y, each, nullptr, 0, nullptr, n, nullptr);
    Buffer<T> total(1);
    Buffer<char> workspace(mse_loss_workspace(n));
    {
      const Lent lt(total), lw(workspace);
      launch_mse_loss(Format<T>::dtype, x, y, nullptr, total.data(), kScale, workspace.data(), n, nullptr);
    }
    return total.value(0) / kScale;
  }
  template <class T>
  static void backward(const T* x, const T* y, const T* grad, bool each_grad, double scale, T* dx, T* dy, int64_t n) {
    rf::cuda::launch_mse_loss_backward(Format<T>::dtype, x, y, grad, each_grad, scale, dx, dy, n, nullptr);
  }
};

template <class T>
void all() {
  Random random(310 + (int)Format<T>::dtype);
  // Around vectors of 16 bytes, a block of 256 of them, and several blocks.
  for (const int64_t n : {0, 1, 3, 7, 8, 9, 31, 1023, 2050, 9001}) mse_loss<Cuda, T>(n, random);
  mse_loss_special_values<Cuda, T>();
  for (const int64_t n : {1000, 16384}) mse_loss_many_terms<Cuda, T>(n);
}

}  // namespace

TEST(mse_loss) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
