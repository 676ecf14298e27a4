// Activations on their own (the GEMM's epilogue has them otherwise), their derivatives with the bias gradient's column
// sums, and squared error.

template <class T, Activation act>
inline void activate_all(const T* z, T* y, int64_t n) {
  using V = vec_t<T>;
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(y + j, activate<act>(load(z + j)));
  if (j < n) store_n(y + j, activate<act>(load_n(z + j, n - j)), n - j);
}

template <class T>
inline void activation_forward(const void* z, void* y, int64_t n, Activation activation) {
  switch (activation) {
#define RF_CASE(act)    \
  case Activation::act: \
    return activate_all<T, Activation::act>((const T*)z, (T*)y, n);
    RF_EACH_ACTIVATION(RF_CASE)
#undef RF_CASE
  }
}

// g act'(z) from what was saved: the output (relu, sigmoid, tanh) or z itself. relu chooses instead of multiplying: as
// torch's, it passes the gradient where the output is NaN, and gives 0 where it is 0, even for an infinite gradient.
// The others tend to 0 or g at both ends, where z may be infinite: what multiplies z is 0 or 1 well before its bounds.
template <Activation act, class V>
inline V through_activation(V g, V s) {
  using A = typename V::scalar;
  const V one = set1(A(1)), zero = set1(A(0));
  if constexpr (act == Activation::relu)
    return select_lt(zero, s, g, select_lt(s, one, zero, g));
  else if constexpr (act == Activation::sigmoid)
    return g * (s * (one - s));
  else if constexpr (act == Activation::tanh)
    return g * (one - s * s);
  else if constexpr (act == Activation::silu) {
    const V bound = set1(A(1000));
    V z = min(bound, max(zero - bound, s)), y, rest;
    sigmoid_and_rest(z, &y, &rest);
    return g * (y * (one + z * rest));
  } else if constexpr (act == Activation::gelu) {
    V gauss = gaussian(s), z = min(set1(A(40)), max(set1(A(-40)), s));
    return g * (normal_cdf(s, gauss) + z * gauss * set1(A(0.39894228040143267794)));
  } else if constexpr (act == Activation::gelu_tanh) {
    V z = min(set1(A(40)), max(set1(A(-40)), s)), zz = z * z;
    V y, rest;
    sigmoid_and_rest(gelu_tanh_argument(z), &y, &rest);
    V du = fma(zz, set1(A(3 * kGeluTanhCubic)), set1(A(kGeluTanhLinear)));
    return g * (y * (one + z * rest * du));
  } else
    return g;
}

template <class T, Activation act>
inline void activation_backward_rows(const ActivationBackwardArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  A* sums = (A*)a.column_sums;
  if (sums)
    for (int64_t j = 0; j < a.columns; ++j) sums[j] = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* g = (const T*)a.grad + a.grad_layout.offset(r);
    const T* s = (const T*)a.saved + (act == Activation::none ? 0 : r * a.columns);
    T* out = a.output ? (T*)a.output + r * a.columns : nullptr;
    for (int64_t j = 0; j < a.columns; j += V::size) {
      const int64_t n = std::min<int64_t>(V::size, a.columns - j);
      const bool full = n == V::size;
      V d = full ? load(g + j) : load_n(g + j, n);
      if constexpr (act != Activation::none) d = through_activation<act>(d, full ? load(s + j) : load_n(s + j, n));
      if (full) {
        if (out) store(out + j, d);
        if (sums) store(sums + j, load(sums + j) + d);
      } else {
        if (out) store_n(out + j, d, n);
        if (sums) store_n(sums + j, load_n(sums + j, n) + d, n);
      }
    }
  }
}

template <class T>
inline void activation_backward(const ActivationBackwardArgs& a, int64_t begin, int64_t end) {
  switch (a.activation) {
#define RF_CASE(act)    \
  case Activation::act: \
    return activation_backward_rows<T, Activation::act>(a, begin, end);
    RF_EACH_ACTIVATION(RF_CASE)
#undef RF_CASE
  }
}

template <class T>
inline double squared_error(const void* px, const void* py, void* peach, int64_t n) {
  using V = vec_t<T>;
  const T *x = (const T*)px, *y = (const T*)py;
  T* each = (T*)peach;
  // Four sums at a time, so that none waits for its last addition.
  constexpr int64_t kStep = 4 * V::size, kSumBlock = kStep * tuning::kSumVectors;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t end = std::min(n, begin + kSumBlock);
    V sum = set1(acc_t<T>(0)), more[4] = {sum, sum, sum, sum};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = j + i * V::size;
        V d = load(x + at) - load(y + at), q = d * d;
        more[i] = more[i] + q;
        if (each) store(each + at, q);
      }
    for (; j + V::size <= end; j += V::size) {
      V d = load(x + j) - load(y + j), q = d * d;
      sum = sum + q;
      if (each) store(each + j, q);
    }
    if (j < end) {
      V d = load_n(x + j, end - j) - load_n(y + j, end - j), q = d * d;
      sum = sum + q;
      if (each) store_n(each + j, q, end - j);
    }
    total += (double)reduce_add(sum + ((more[0] + more[1]) + (more[2] + more[3])));
  }
  return total;
}

template <class T>
inline void squared_error_backward(const void* px, const void* py, const void* pg, bool each_grad, double scale,
                                   void* pdx, void* pdy, int64_t n) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const T *x = (const T*)px, *y = (const T*)py, *g = (const T*)pg;
  T *dx = (T*)pdx, *dy = (T*)pdy;
  const V factor = set1(A(scale)), shared = factor * set1(load_one(g)), zero = set1(A(0));
  for (int64_t j = 0; j < n; j += V::size) {
    const int64_t count = std::min<int64_t>(V::size, n - j);
    const bool full = count == V::size;
    V d = full ? load(x + j) - load(y + j) : load_n(x + j, count) - load_n(y + j, count);
    V s = !each_grad ? shared : factor * (full ? load(g + j) : load_n(g + j, count));
    d = d * s;
    if (dx) full ? store(dx + j, d) : store_n(dx + j, d, count);
    if (dy) full ? store(dy + j, zero - d) : store_n(dy + j, zero - d, count);
  }
}

// The float32 peak of this core: independent chains of fma, as many as the latency needs.
inline double fma_gflops(double seconds) {
  constexpr int kChains = 12, kRepeats = 4096;
  f32v acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = set1(1.0f + i);
  const f32v a = set1(0.999999f), b = set1(1e-6f);
  double done = 0, elapsed = 0;
  const auto start = std::chrono::steady_clock::now();
  while (elapsed < seconds) {
    for (int n = 0; n < kRepeats; ++n)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    done += 2.0 * f32v::size * kChains * kRepeats;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  f32v sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = sum + acc[i];
  // The result is used, so that the loop is not removed: a sum of positive numbers is not negative.
  return reduce_add(sum) < 0 ? 0 : done / elapsed * 1e-9;
}
