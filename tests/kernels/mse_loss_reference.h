// The squared loss and its gradients in double precision, for both devices.
#pragma once
#include <cmath>

#include "memory.h"

namespace test {

// Of each element; returns their sum.
template <class T>
double check_each_mse_loss(const Buffer<T>& x, const Buffer<T>& y, Buffer<T>& each) {
  Comparison<T> compare("each");
  double sum = 0;
  for (int64_t i = 0; i < x.count(); ++i) {
    const double d = x.value(i) - y.value(i);
    sum += d * d;
    compare.add(each.result(i), d * d, 4 * d * d, i);
  }
  return sum;
}

// g is one number, or one for each element; of the gradients those are compared that are not null.
template <class T>
void check_mse_loss_backward(const Buffer<T>& x, const Buffer<T>& y, const Buffer<T>& g, double scale, Buffer<T>* dx,
                             Buffer<T>* dy) {
  Comparison<T> of_dx("dx"), of_dy("dy");
  for (int64_t i = 0; i < x.count(); ++i) {
    const double d = scale * g.value(g.count() == 1 ? 0 : i) * (x.value(i) - y.value(i));
    if (dx) of_dx.add(dx->result(i), d, 8 * std::fabs(d), i);
    if (dy) of_dy.add(dy->result(i), -d, 8 * std::fabs(d), i);
  }
}

}  // namespace test
