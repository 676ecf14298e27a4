// A linear model with up to kFewOutputs outputs and its likelihood in one pass over x: predictions, losses, residuals
// and the gradients of weight, bias and x, a block of rows at a time while it is in L1. The product is bound by reading
// x, which F.linear, the loss's backward and the weight's gradient would read twice or more.

// Results of a block have lanes along rows: element (r, j) at j * kPassRows + r, zero beyond the last row.
constexpr int64_t kPassRows = tuning::kPassRows;

// Rows of up to a vector's features are transposed: there, too, lanes go along rows.
template <class T>
constexpr bool kTransposes = std::is_same_v<vec_t<T>, f32v> && f32v::size > 1;

template <class A>
inline void spread(const A* from, int64_t rows, int64_t outputs, A* to) {
  for (int64_t j = 0; j < outputs; ++j) {
    for (int64_t r = 0; r < rows; ++r) to[j * kPassRows + r] = from[r * outputs + j];
    for (int64_t r = rows; r < kPassRows; ++r) to[j * kPassRows + r] = 0;
  }
}

// Losses and slopes of a block that begins with row `row`; the latter replace the predictions.
template <class A, Family family, bool value, bool slope>
inline void judge_block(const LikelihoodArgs& a, int64_t row, int64_t rows, A* predictions, vec_t<A>* bias,
                        vec_t<A>* variance, double* total) {
  using V = vec_t<A>;
  constexpr int64_t kRoom = tuning::kFewOutputs * kPassRows;
  alignas(64) A target[kRoom], grad[kRoom], losses[kRoom], weight[kPassRows];
  const int64_t at = row * a.outputs;
  spread((const A*)a.target + at, rows, a.outputs, target);
  if (a.grad) spread((const A*)a.grad + at, rows, a.outputs, grad);
  if (a.row_weight) spread((const A*)a.row_weight + row, rows, 1, weight);
  const V half = set1(A(0.5)), zero = set1(A(0)), factor = set1(A(a.grad_scale));
  V sum = zero;
  for (int64_t j = 0; j < a.outputs; ++j) {
    V s = zero, c = zero;
    if constexpr (family != Family::poisson) s = set1(((const A*)a.scale)[j]);
    if constexpr (family == Family::gaussian) c = set1(((const A*)a.constant)[j]);
    for (int64_t r = 0; r < rows; r += V::size) {
      const int64_t i = j * kPassRows + r, n = std::min<int64_t>(V::size, rows - r);
      V x = load(predictions + i), y = load(target + i);
      V w = a.row_weight ? load(weight + r) : set1(A(1));
      const Judged<V> judged = judge<family>(x, y, s, c);
      if constexpr (value) {
        V l = w * judged.loss;
        store(losses + i, l);
        sum = sum + (n == V::size ? l : first_n(l, n, zero));
      }
      if constexpr (slope) {
        V g = w * factor;
        if (a.grad) g = g * load(grad + i);
        V d = g * judged.slope;
        if (n < V::size) d = first_n(d, n, zero);
        store(predictions + i, d);
        bias[j] = bias[j] + d;
        if constexpr (family == Family::gaussian)
          if (variance) {
            V v = half * s * (g - d * (x - y));
            variance[j] = variance[j] + (n == V::size ? v : first_n(v, n, zero));
          }
      }
    }
  }
  *total += (double)reduce_add(sum);
  if (value && a.loss)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < a.outputs; ++j) ((A*)a.loss)[at + r * a.outputs + j] = losses[j * kPassRows + r];
}

// sums[j][c] += over rows of slopes[j][row] * x[row][c], for Q outputs and, from column c on, N vectors.
template <class T, int Q, int N>
inline void add_outer(const T* const* x, int64_t rows, const acc_t<T>* slopes, int64_t c, int64_t n, acc_t<T>* sums,
                      int64_t features) {
  using V = vec_t<T>;
  V acc[Q][N];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) acc[q][v] = set1(acc_t<T>(0));
  for (int64_t r = 0; r < rows; ++r) {
    V columns[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) columns[v] = N > 1 ? load(x[r] + c + v * V::size) : load_up_to(x[r] + c, n);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      V slope = set1(slopes[q * kPassRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) acc[q][v] = fma(slope, columns[v], acc[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      acc_t<T>* to = sums + q * features + c + v * V::size;
      const int64_t width = N > 1 ? V::size : n;
      store_up_to(to, load_up_to(to, width) + acc[q][v], width);
    }
}
template <class T, int Q>
inline void add_outer_products(const T* const* x, int64_t rows, const acc_t<T>* slopes, int64_t features,
                               acc_t<T>* sums) {
  constexpr int64_t W = vec_t<T>::size;
  constexpr int N = Q <= 2 ? 4 : 2;
  int64_t c = 0;
  for (; c + N * W <= features; c += N * W) add_outer<T, Q, N>(x, rows, slopes, c, W, sums, features);
  for (; c < features; c += W) add_outer<T, Q, 1>(x, rows, slopes, c, std::min(W, features - c), sums, features);
}

template <class T>
inline void add_weight_gradient(const T* const* x, int64_t rows, const acc_t<T>* slopes, int64_t outputs,
                                int64_t features, acc_t<T>* sums) {
  for (; outputs >= 4; outputs -= 4, slopes += 4 * kPassRows, sums += 4 * features)
    add_outer_products<T, 4>(x, rows, slopes, features, sums);
  switch (outputs) {
    case 3:
      return add_outer_products<T, 3>(x, rows, slopes, features, sums);
    case 2:
      return add_outer_products<T, 2>(x, rows, slopes, features, sums);
    case 1:
      return add_outer_products<T, 1>(x, rows, slopes, features, sums);
  }
}

// Predictions without bias: dot products of R rows at a time with all of weight's, as gemm_dot has them.
template <class T, int R>
inline void predict_rows(const T* const* x, int64_t rows, const T* const* weight, int64_t outputs, int64_t features,
                         acc_t<T>* to) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_rows<T, R>(x + r, weight, outputs, features, to + r, 1, kPassRows);
  for (; r < rows; ++r) dot_rows<T, 1>(x + r, weight, outputs, features, to + r, 1, kPassRows);
}
template <class T>
inline void predict_block(const T* const* x, int64_t rows, const T* const* weight, int64_t outputs, int64_t features,
                          acc_t<T>* to) {
  outputs == 1   ? predict_rows<T, 8>(x, rows, weight, outputs, features, to)
  : outputs == 2 ? predict_rows<T, 4>(x, rows, weight, outputs, features, to)
                 : predict_rows<T, kTile.dot_rows>(x, rows, weight, outputs, features, to);
}

// A row of x's gradient, in x's type or the accumulator's.
template <class T>
inline void store_gradient(const FewOutputsArgs& a, int64_t at, vec_t<T> d, int64_t n) {
  a.wide_grad_x ? store_up_to((acc_t<T>*)a.grad_x + at, d, n) : store_up_to((T*)a.grad_x + at, d, n);
}
template <class T>
inline void write_x_gradient(const FewOutputsArgs& a, const T* const* weight, int64_t row, int64_t rows,
                             const acc_t<T>* slopes) {
  using V = vec_t<T>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < a.features; c += V::size) {
      const int64_t n = std::min<int64_t>(V::size, a.features - c);
      V d = set1(acc_t<T>(0));
      for (int64_t j = 0; j < a.likelihood.outputs; ++j)
        d = fma(set1(slopes[j * kPassRows + r]), load_up_to(weight[j] + c, n), d);
      store_gradient<T>(a, (row + r) * a.features + c, d, n);
    }
}

// Columns of a block of up to V::size features: column c at to + c * kPassRows, zero beyond the last row.
template <class T>
inline void transpose_block(const T* const* x, int64_t rows, int64_t features, acc_t<T>* to) {
  using V = vec_t<T>;
  for (int64_t r = 0; r < rows; r += V::size) {
    V square[V::size];
#pragma GCC unroll 16
    for (int i = 0; i < V::size; ++i)
      square[i] = r + i < rows ? load_up_to(x[r + i], features) : set1(acc_t<T>(0));
    transpose(square);
    for (int64_t c = 0; c < features; ++c) store(to + c * kPassRows + r, square[c]);
  }
}

// A model of up to V::size features, all of it with lanes along rows.
template <class T, Family family, bool value, bool slope>
inline void few_features(const FewOutputsArgs& a, const T* const* x, const acc_t<T>* weight, int64_t row, int64_t rows,
                         vec_t<T>* outer, vec_t<T>* bias, vec_t<T>* variance, double* total) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  const int64_t outputs = a.likelihood.outputs, features = a.features;
  alignas(64) A columns[V::size * kPassRows], slopes[tuning::kFewOutputs * kPassRows];
  transpose_block(x, rows, features, columns);
  for (int64_t j = 0; j < outputs; ++j)
    for (int64_t r = 0; r < rows; r += V::size) {
      V eta = set1(((const A*)a.bias)[j]);
      for (int64_t c = 0; c < features; ++c)
        eta = fma(set1(weight[j * features + c]), load(columns + c * kPassRows + r), eta);
      store(slopes + j * kPassRows + r, eta);
    }
  judge_block<A, family, value, slope>(a.likelihood, row, rows, slopes, bias, variance, total);
  if constexpr (!slope) return;
  if (a.grad_weight)
    for (int64_t j = 0; j < outputs; ++j)
      for (int64_t c = 0; c < features; ++c) {
        V sum = outer[j * features + c];
        for (int64_t r = 0; r < rows; r += V::size)
          sum = fma(load(slopes + j * kPassRows + r), load(columns + c * kPassRows + r), sum);
        outer[j * features + c] = sum;
      }
  if (!a.grad_x) return;
  for (int64_t r = 0; r < rows; r += V::size) {
    V square[V::size];
    for (int64_t c = 0; c < V::size; ++c) {
      square[c] = set1(A(0));
      for (int64_t j = 0; c < features && j < outputs; ++j)
        square[c] = fma(load(slopes + j * kPassRows + r), set1(weight[j * features + c]), square[c]);
    }
    transpose(square);
    for (int64_t i = 0; i < V::size && r + i < rows; ++i)
      store_gradient<T>(a, (row + r + i) * features, square[i], features);
  }
}

template <class T, Family family, bool value, bool slope>
inline void few_outputs_rows(const FewOutputsArgs& a, int64_t begin, int64_t end, LikelihoodSums* sums) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  constexpr int64_t kMost = tuning::kFewOutputs;
  const int64_t outputs = a.likelihood.outputs, features = a.features;
  V bias[kMost], variance[kMost];
  for (int64_t j = 0; j < kMost; ++j) bias[j] = variance[j] = set1(A(0));
  A* grad_weight = (A*)a.grad_weight;
  const T* weight[kMost];
  for (int64_t j = 0; j < outputs; ++j) weight[j] = (const T*)a.weight + j * features;
  const bool narrow = kTransposes<T> && features <= V::size;
  V outer[kTransposes<T> ? kMost * V::size : 1];
  A wide_weight[kMost * V::size];
  if (narrow)
    for (int64_t i = 0; i < outputs * features; ++i) {
      outer[i] = set1(A(0));
      wide_weight[i] = load_one((const T*)a.weight + i);
    }
  else if (grad_weight)
    for (int64_t i = 0; i < outputs * features; ++i) grad_weight[i] = 0;
  sums->loss = 0;
  for (int64_t row = begin; row < end; row += kPassRows) {
    const int64_t rows = std::min(kPassRows, end - row);
    const T* x[kPassRows];
    for (int64_t r = 0; r < rows; ++r) x[r] = (const T*)a.x.data + a.x.row_offset(row + r);
    if constexpr (kTransposes<T>)
      if (narrow) {
        few_features<T, family, value, slope>(a, x, wide_weight, row, rows, outer, bias,
                                              sums->variance ? variance : nullptr, &sums->loss);
        continue;
      }
    alignas(64) A slopes[kMost * kPassRows] = {};
    predict_block(x, rows, weight, outputs, features, slopes);
    for (int64_t j = 0; j < outputs; ++j)
      for (int64_t r = 0; r < rows; ++r) slopes[j * kPassRows + r] += ((const A*)a.bias)[j];
    judge_block<A, family, value, slope>(a.likelihood, row, rows, slopes, bias, sums->variance ? variance : nullptr,
                                         &sums->loss);
    if (slope && grad_weight) add_weight_gradient(x, rows, slopes, outputs, features, grad_weight);
    if (slope && a.grad_x) write_x_gradient(a, weight, row, rows, slopes);
  }
  for (int64_t j = 0; j < outputs; ++j) {
    if (sums->bias) ((A*)sums->bias)[j] = reduce_add(bias[j]);
    if (sums->variance) ((A*)sums->variance)[j] = reduce_add(variance[j]);
  }
  if (narrow && grad_weight)
    for (int64_t i = 0; i < outputs * features; ++i) grad_weight[i] = reduce_add(outer[i]);
}

template <class T>
inline void few_outputs(const FewOutputsArgs& a, int64_t begin, int64_t end, LikelihoodSums* sums) {
  RF_EACH_LIKELIHOOD(few_outputs_rows, T, a.likelihood, sums, a, begin, end, sums)
}
#undef RF_EACH_LIKELIHOOD
