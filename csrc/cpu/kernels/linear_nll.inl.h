// Negative log-likelihoods of the exponential family and their derivatives with respect to a linear prediction, each
// estimate minus observation (McCullagh and Nelder, "Generalized Linear Models", 1989), over rows of predictions.
#pragma once
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"

// log(1 + e) for 0 <= e <= 1: 2 atanh(s), s = e / (2 + e), whose series in s^2 <= 1/9 converges fast. The float's
// coefficients are fitted to 4e-9; the double's are the series, up to 2e-17.
inline f32v log1p_unit(f32v e) {
  f32v s = e / (e + set1(2.0f)), u = s * s;
  f32v p = set1(0.140788891816f);
  p = fma(p, u, set1(0.139825788726f));
  p = fma(p, u, set1(0.200122976154f));
  p = fma(p, u, set1(0.333331608207f));
  p = fma(p, u, set1(1.0f));
  return (s + s) * p;
}
inline f64v log1p_unit(f64v e) {
  f64v s = e / (e + set1(2.0)), u = s * s;
  f64v p = set1(1.0 / 33);
  for (int k = 31; k > 0; k -= 2) p = fma(p, u, set1(1.0 / k));
  return (s + s) * p;
}

template <class V>
struct LossAndSlope {
  V loss, slope;
};
// squared is computed as gaussian. What is not used is not computed: this is inlined.
template <Family family, class V>
inline LossAndSlope<V> loss_and_slope(V eta, V y, V factor, V constant) {
  using A = typename V::scalar;
  if constexpr (family == Family::gaussian) {
    V residual = eta - y, slope = factor * residual;
    return {fma(slope * set1(A(0.5)), residual, constant), slope};
  } else if constexpr (family == Family::bernoulli) {
    // Both tails from e = exp(-|eta|) <= 1: no overflow, and no difference of numbers that are nearly 1.
    const V zero = set1(A(0)), one = set1(A(1)), e = exp(zero - abs(eta)), positive = factor * y, negative = one - y;
    V larger = one / (one + e), smaller = e * larger;
    V up = select_lt(eta, zero, smaller, larger), down = select_lt(eta, zero, larger, smaller);
    V far = negative * max(zero, eta) + positive * max(zero, zero - eta);
    return {fma(positive + negative, log1p_unit(e), far), negative * up - positive * down};
  } else {
    // Without log(y!), which the op adds where it is asked for.
    V mean = exp(eta);
    return {mean - y * eta, mean - y};
  }
}

// ---- lanes that are rows -------------------------------------------------------------------------------------------

// Sums over rows, a lane each, which are put aside in double precision before a lane has added too many.
template <class V, int64_t most = tuning::kFewOutputs>
struct LaneSums {
  V bias[most], variance[most], loss;
  CompensatedSum bias_total[most], variance_total[most], loss_total;
  int64_t vectors, losses;

  LaneSums() : vectors(0), losses(0) {
    loss = set1(typename V::scalar(0));
    for (int64_t j = 0; j < most; ++j) bias[j] = variance[j] = loss;
  }
  void add_loss(V l) {
    // A lane adds up kSumVectors losses at most before they are put aside.
    loss = loss + l;
    if (++losses < tuning::kSumVectors) return;
    loss_total.add((double)reduce_add(loss));
    loss = set1(typename V::scalar(0));
    losses = 0;
  }
  // To be told of every so many vectors of rows.
  void count(int64_t more, int64_t outputs) {
    vectors += more;
    if (vectors >= tuning::kSumVectors) put_aside(outputs);
  }
  void put_aside(int64_t outputs) {
    for (int64_t j = 0; j < outputs; ++j) {
      bias_total[j].add((double)reduce_add(bias[j]));
      variance_total[j].add((double)reduce_add(variance[j]));
      bias[j] = variance[j] = set1(typename V::scalar(0));
    }
    vectors = 0;
  }
  void write(int64_t outputs, LikelihoodSums* to) {
    using A = typename V::scalar;
    put_aside(outputs);
    for (int64_t j = 0; j < outputs; ++j) {
      if (to->bias) ((A*)to->bias)[j] = (A)bias_total[j].value();
      if (to->variance) ((A*)to->variance)[j] = (A)variance_total[j].value();
    }
    loss_total.add((double)reduce_add(loss));
    to->loss = loss_total.value();
  }
};

// Losses of output j of n rows from `row` on, stored as type T; returns their slopes, 0 beyond the last row. A call
// would put all of a block's columns on the stack and fetch them back: inlined by force.
template <class T, Family family, bool value, bool slope, class V, int64_t most>
[[gnu::always_inline]] inline V lanes_loss_and_slope(const LikelihoodArgs& a, int64_t row, int64_t n, int64_t j, V eta,
                                                     V y, V grad, LaneSums<V, most>* sums) {
  using A = acc_t<T>;
  const V zero = set1(A(0));
  const bool full = n == V::size;
  V s = zero, c = zero;
  // Null is the same for all rows, and its branch foretold.
  V w = a.row_weight ? load_up_to((const A*)a.row_weight + row, n) : set1(A(1));
  if constexpr (family != Family::poisson) s = set1(((const A*)a.output_factor)[j]);
  if constexpr (family == Family::gaussian)
    if (a.constant) c = set1(((const A*)a.constant)[j]);
  const LossAndSlope<V> both = loss_and_slope<family>(eta, y, s, c);
  if constexpr (value) {
    V l = w * both.loss;
    // Lanes beyond the last row have a loss too.
    sums->add_loss(full ? l : first_n(l, n, zero));
    if (a.loss && a.outputs == 1) {
      store_up_to((T*)a.loss + row, l, n);
    } else if (a.loss) {
      alignas(64) T lanes[V::size];
      store(lanes, l);
      for (int64_t i = 0; i < n; ++i) ((T*)a.loss)[(row + i) * a.outputs + j] = lanes[i];
    }
  }
  V d = zero;
  if constexpr (slope) {
    V g = w * set1(A(a.grad_scale)) * grad;
    d = g * both.slope;
    // A variance's derivative, w g f (1 - f (eta - y)^2) / 2, of what there is already.
    V v = set1(A(0.5)) * s * (g - d * (eta - y));
    if (!full) {
      d = first_n(d, n, zero);
      v = first_n(v, n, zero);
    }
    sums->bias[j] = sums->bias[j] + d;
    if constexpr (family == Family::gaussian) sums->variance[j] = sums->variance[j] + v;
  }
  return d;
}

// Of one output, whose column lies as a row does: lanes are rows.
template <class T, Family family, bool value, bool slope>
inline void likelihood_column(const LikelihoodArgs& a, void* predictions, int64_t begin, int64_t end,
                              LikelihoodSums* sums) {
  using V = vec_t<T>;
  acc_t<T>* eta = (acc_t<T>*)predictions;
  const T *target = (const T*)a.target, *grad = (const T*)a.grad;
  LaneSums<V, 1> lanes;
  for (int64_t r = begin; r < end; r += V::size) {
    const int64_t n = std::min<int64_t>(V::size, end - r);
    const V g = grad ? load_up_to(grad + r, n) : set1(acc_t<T>(1));
    const V d = lanes_loss_and_slope<T, family, value, slope>(a, r, n, 0, load_up_to(eta + r, n),
                                                              load_up_to(target + r, n), g, &lanes);
    if constexpr (slope) store_up_to(eta + r, d, n);
    lanes.count(1, 1);
  }
  lanes.write(1, sums);
}

// ---- lanes that are outputs ----------------------------------------------------------------------------------------

// Targets, losses and upstream gradients of type T, all else of the accumulator's.
template <class T, Family family, bool value, bool slope>
inline void likelihood_rows(const LikelihoodArgs& a, void* predictions, int64_t begin, int64_t end,
                            LikelihoodSums* sums) {
  if (a.outputs == 1) return likelihood_column<T, family, value, slope>(a, predictions, begin, end, sums);
  using A = acc_t<T>;
  using V = vec_t<A>;
  const A *factor = (const A*)a.output_factor, *constant = (const A*)a.constant, *row_weight = (const A*)a.row_weight;
  A *bias = (A*)sums->bias, *variance = (A*)sums->variance;
  // Of this range alone: ranges are added up in order.
  for (int64_t j = 0; j < a.outputs; ++j) {
    if (bias) bias[j] = 0;
    if (variance) variance[j] = 0;
  }
  const V half = set1(A(0.5)), zero = set1(A(0));
  // The loss's sum, put aside in double precision before a lane has added too many.
  CompensatedSum total;
  V sum = zero;
  int64_t terms = 0;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * a.outputs;
    A* eta = (A*)predictions + at;
    const T *target = (const T*)a.target + at, *grad = a.grad ? (const T*)a.grad + at : nullptr;
    T* loss = a.loss ? (T*)a.loss + at : nullptr;
    // A row's weight is the same for all its outputs, along which the lanes go.
    const V w = set1(row_weight ? row_weight[r] : A(1)), shared = w * set1(A(a.grad_scale));
    for (int64_t j = 0; j < a.outputs; j += V::size) {
      const int64_t n = std::min<int64_t>(V::size, a.outputs - j);
      V x = load_up_to(eta + j, n), y = load_up_to(target + j, n), s = zero, c = zero;
      if constexpr (family != Family::poisson) s = load_up_to(factor + j, n);
      if constexpr (family == Family::gaussian)
        if (constant) c = load_up_to(constant + j, n);
      const LossAndSlope<V> both = loss_and_slope<family>(x, y, s, c);
      if constexpr (value) {
        // The loss as it is returned, and summed as it is returned.
        V l = w * both.loss;
        if (loss) store_up_to(loss + j, l, n);
        // exp(0) - 0 is 1: lanes beyond the last are not 0 by themselves.
        sum = sum + (n == V::size ? l : first_n(l, n, zero));
        if (++terms == tuning::kSumVectors) {
          total.add((double)reduce_add(sum));
          sum = zero;
          terms = 0;
        }
      }
      if constexpr (slope) {
        V g = grad ? shared * load_up_to(grad + j, n) : shared, d = g * both.slope;
        // In place of the prediction, for the products that follow.
        store_up_to(eta + j, d, n);
        if (bias) store_up_to(bias + j, load_up_to(bias + j, n) + d, n);
        if constexpr (family == Family::gaussian)
          if (variance) {
            V v = half * s * (g - d * (x - y));
            store_up_to(variance + j, load_up_to(variance + j, n) + v, n);
          }
      }
    }
  }
  total.add((double)reduce_add(sum));
  sums->loss = total.value();
}

// The instance for a call's family, and for what it asks for: losses, slopes or both.
#define RF_DISPATCH_SUMS(function, T, family, sums, ...)                             \
  sums->value && sums->slope ? function<T, Family::family, true, true>(__VA_ARGS__)  \
  : sums->value              ? function<T, Family::family, true, false>(__VA_ARGS__) \
                             : function<T, Family::family, false, true>(__VA_ARGS__)
#define RF_EACH_LIKELIHOOD(function, T, args, sums, ...)                  \
  switch (args.family) {                                                  \
    case Family::squared:                                                 \
    case Family::gaussian:                                                \
      return RF_DISPATCH_SUMS(function, T, gaussian, sums, __VA_ARGS__);  \
    case Family::bernoulli:                                               \
      return RF_DISPATCH_SUMS(function, T, bernoulli, sums, __VA_ARGS__); \
    case Family::poisson:                                                 \
      return RF_DISPATCH_SUMS(function, T, poisson, sums, __VA_ARGS__);   \
  }

template <class T>
inline void likelihood(const LikelihoodArgs& a, void* predictions, int64_t begin, int64_t end, LikelihoodSums* sums) {
  RF_EACH_LIKELIHOOD(likelihood_rows, T, a, sums, a, predictions, begin, end, sums)
}
