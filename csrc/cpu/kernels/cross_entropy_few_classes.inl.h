// Cross-entropy of few classes, forward and backward: the formulas of cross_entropy.inl.h and
// cross_entropy_backward.inl.h with a lane to a row, so that nothing is left to scalar code, and all options are loops
// over a tile's classes. Sums have at most kFewColumns terms, and need no wider type.
#pragma once
#include "cpu/kernels/column_tile.inl.h"
#include "cpu/kernels/cross_entropy_logits.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

template <class A>
struct CrossEntropyTile {
  ColumnTile<A> logits, target, target_grad;  // logits: scaled and capped; in backward their gradient takes their place
  A y[tuning::kLaneRows];                     // class, or -1 of rows that are ignored or have probabilities
};

// A row's numbers, or `otherwise` where there are none.
template <class A>
inline vec_t<A> load_rows(const void* p, int64_t row, int64_t n, A otherwise = 0) {
  return p ? load_up_to((const A*)p + row, n) : set1(otherwise);
}
template <class A>
inline void store_rows(void* p, int64_t row, vec_t<A> x, int64_t n) {
  if (p) store_up_to((A*)p + row, x, n);
}

template <class T>
inline void load_cross_entropy_tile(const CrossEntropyArgs& a, bool probabilities, int64_t row, int64_t rows,
                                    CrossEntropyTile<acc_t<T>>& tile) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  load_tile((const T*)a.logits, a.layout, row, rows, a.classes, tile.logits);
  const LogitTransform<A> transform = {A(a.logit_scale), A(a.softcap)};
  for (int64_t c = 0; !transform.identity() && c < a.classes; ++c)
    for (A* z = tile.logits.at + c * R; z < tile.logits.at + c * R + rows; z += W) store(z, transform(load(z)));
  if (probabilities) load_tile((const T*)a.probabilities, a.probability_layout, row, rows, a.classes, tile.target);
  for (int64_t r = 0; r < R; r += W) store(tile.y + r, set1(A(-1)));
  if (!a.target) return;
  // As numbers of the lanes' type, which select_eq compares: classes are few enough to be exact.
  const int64_t *target = a.target + row, ignored = a.ignore_index;
  for (int64_t r = 0; r < rows; ++r) tile.y[r] = target[r] == ignored ? A(-1) : A((int32_t)target[r]);
}

// The class weight of each row's class, 1 without weights; 0 of a row without a class.
template <class A>
inline vec_t<A> weight_of_class(const CrossEntropyArgs& a, vec_t<A> y) {
  const A* weight = (const A*)a.class_weight;
  const auto zero = set1(A(0));
  if (!weight) return select_lt(y, zero, zero, set1(A(1)));
  auto w = zero;
  // A gather would wait for its index; few classes are compared in no more time.
  for (int64_t c = 0; c < a.classes; ++c) w = select_eq(y, set1(A(c)), set1(weight[c]), w);
  return w;
}

// What one look at the classes tells of each of a tile's rows. Kept apart from what follows of it: what a row needs one
// after the other (maximum, exponentials, logarithm) takes longer than all that it computes, and in two loops the rows
// that come next are under way meanwhile.
template <class A>
struct TileSums {
  A max[tuning::kLaneRows], ones[tuning::kLaneRows], rest[tuning::kLaneRows];  // as ExpSum
  A weighted[tuning::kLaneRows];                                               // sum e (z - max), for the entropy
  A of_target[tuning::kLaneRows];                                              // the logit of the row's class
};

// With `keep`, exponentials take the place of the logits.
template <bool keep, class A>
inline void sum_lanes(const CrossEntropyArgs& a, CrossEntropyTile<A>& tile, int64_t i, TileSums<A>& sums) {
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows;
  A* z = tile.logits.at + i;
  const V zero = set1(A(0)), y = load(tile.y + i);
  // Two looks at the classes: maximum, then everything that is a sum.
  V m = set1(minus_infinity<A>());
  for (int64_t c = 0; c < a.classes; ++c) m = max(load(z + c * R), m);
  const V origin = lane_origin(m);
  V weighted = zero, of_target = zero;
  ExpSum<V> exps = {zero, zero};
  for (int64_t c = 0; c < a.classes; ++c) {
    const V zc = load(z + c * R), e = exp(zc - origin);
    exps.add(e, zc, origin);
    // The target's logit is selected on the way: rows' classes differ from lane to lane.
    of_target = select_eq(y, set1(A(c)), zc, of_target);
    if (!keep && a.row_entropy) weighted = fma(e, max(set1(kLeastExponent<A>), zc - origin), weighted);
    if (keep) store(z + c * R, e);
  }
  store(sums.max + i, m);
  store(sums.ones + i, exps.ones);
  store(sums.rest + i, exps.rest);
  store(sums.weighted + i, weighted);
  store(sums.of_target + i, of_target);
}

// log sum exp(z - max) and log sum exp z of rows. As row_result: with +inf in a row the latter is the sum, infinite or
// NaN. What backward needs of it is stored.
template <class A>
struct TileResult {
  vec_t<A> sum, log_sum, lse;

  TileResult(const CrossEntropyArgs& a, const TileSums<A>& sums, int64_t i, int64_t row, int64_t n) {
    using V = vec_t<A>;
    const V m = load(sums.max + i), inf = set1(-minus_infinity<A>());
    const ExpSum<V> exps = {load(sums.ones + i), load(sums.rest + i)};
    sum = exps.sum();
    log_sum = select_eq(m, inf, set1(std::numeric_limits<A>::quiet_NaN()), exps.log_of_sum());
    lse = select_eq(m, inf, sum, m + log_sum);
    store_rows<A>(a.row_max, row, select_eq(m, inf, select_eq(sum, sum, m, sum), m), n);
    store_rows<A>(a.row_log_sum, row, log_sum, n);
  }
};

// Losses and statistics of a vector of the tile's rows from `i` on; `loss` and `weight` get their terms of the sums.
template <class A>
inline void cross_entropy_lanes(const CrossEntropyArgs& a, const CrossEntropyOutputs& out,
                                const CrossEntropyTile<A>& tile, const TileSums<A>& sums, int64_t i, int64_t row,
                                int64_t n, A* loss, A* weight) {
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows;
  const A *z = tile.logits.at + i, *t = tile.target.at + i, *class_weight = (const A*)a.class_weight;
  const V zero = set1(A(0)), y = load(tile.y + i), m = load(sums.max + i), origin = lane_origin(m);
  const TileResult<A> result(a, sums, i, row, n);
  const V sum = result.sum, log_sum = result.log_sum, lse = result.lse, zy = load(sums.of_target + i);
  if (a.row_entropy) store_rows<A>(a.row_entropy, row, log_sum - load(sums.weighted + i) / sum, n);
  store_rows<A>(out.lse, row, lse, n);
  if (out.argmax) {
    // The first maximum, or the first NaN.
    // From the last class down, so that the first one stays.
    V first = zero, nan = zero;
    for (int64_t c = a.classes - 1; c >= 0; --c) {
      const V zc = load(z + c * R);
      first = select_eq(zc, m, set1(A(c)), first);
      nan = select_eq(zc, zc, nan, set1(A(c)));
    }
    A lane[V::size];
    store(lane, select_eq(sum, sum, first, nan));
    for (int64_t r = 0; r < n; ++r) out.argmax[row + r] = (int64_t)lane[r];
  }

  const A keep = A(1 - a.label_smoothing), spread = A(a.label_smoothing / (double)a.classes);
  V losses, denominator = set1(A(1)), logprob;
  if (a.probabilities) {
    // As block_target_sums, of all classes at once.
    V q_dot = zero, q_mass = zero, t_dot = zero, t_mass = zero;
    for (int64_t c = 0; c < a.classes; ++c) {
      const V tc = load(t + c * R), zc = load(z + c * R) - origin;
      const V q = set1(class_weight ? class_weight[c] : A(1)) * fma(set1(keep), tc, set1(spread));
      q_dot = fma(q, zc, q_dot);
      q_mass = q_mass + q;
      t_dot = fma(tc, zc, t_dot);
      t_mass = t_mass + tc;
    }
    store_rows<A>(a.row_mass, row, q_mass, n);
    store_rows<A>(a.row_target_mass, row, t_mass, n);
    losses = q_mass * log_sum - q_dot;
    logprob = t_dot - t_mass * log_sum;
    if (a.z_loss != 0) losses = fma(set1(A(a.z_loss)) * lse, lse, losses);
  } else {
    // 0 of rows that are ignored, so that the mean does not count them.
    denominator = weight_of_class<A>(a, y);
    logprob = (zy - m) - log_sum;
    losses = set1(-keep) * denominator * logprob;
    if (spread != A(0)) {
      V dot = zero;
      for (int64_t c = 0; c < a.classes; ++c)
        dot = fma(set1(class_weight ? class_weight[c] : A(1)), load(z + c * R) - origin, dot);
      losses = losses + set1(spread) * (set1(A(a.class_weight_sum)) * log_sum - dot);
    }
    if (a.z_loss != 0) losses = fma(set1(A(a.z_loss)) * lse, lse, losses);
    // Of rows that are ignored nothing counts, whatever is in them.
    logprob = select_lt(y, zero, zero, logprob);
    losses = select_lt(y, zero, zero, losses);
  }
  store_rows<A>(out.logprob, row, logprob, n);
  store_rows<A>(out.loss, row, losses, n);
  store(loss, losses);
  store(weight, denominator);
}

// The sum of n numbers, as double, in four chains.
template <class A>
inline double sum_of(const A* x, int64_t n) {
  // Four chains, however wide the vectors are.
  double s[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int64_t k = 0; k < 4; ++k) s[k] += x[i + k];
  for (int64_t k = 0; i < n; ++i, ++k) s[k] += x[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

template <class T>
inline CrossEntropyPartial cross_entropy_few_classes(const CrossEntropyArgs& a, const CrossEntropyOutputs& out,
                                                     int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  CrossEntropyTile<A> tile;
  TileSums<A> lanes;
  A loss[R], weight[R];
  CompensatedSum losses, weights;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_cross_entropy_tile<T>(a, a.probabilities, row, rows, tile);
    for (int64_t i = 0; i < rows; i += W) sum_lanes<false>(a, tile, i, lanes);
    for (int64_t i = 0; i < rows; i += W)
      cross_entropy_lanes<A>(a, out, tile, lanes, i, row + i, std::min(W, rows - i), loss + i, weight + i);
    losses.add(sum_of(loss, rows));
    weights.add(sum_of(weight, rows));
  }
  return {losses.value(), weights.value(), -1};
}

// coefficient p - hot, p = e exp(-log sum), e = exp(z - max): as PlainGradient, whether forward has kept e or not.
template <class V>
inline V lane_gradient(V e, V reciprocal, V coefficient, V hot) {
  using A = scalar_t<V>;
  const V zero = set1(A(0)), p = e * reciprocal;
  return fma(select_lt(p, set1(kLeastProbability<A>), zero, p), coefficient, zero - hot);
}

// Gradients of a vector of the tile's rows, in the place of logits.
template <class A>
inline void cross_entropy_backward_lanes(const CrossEntropyArgs& a, const CrossEntropyGrads& g,
                                         CrossEntropyTile<A>& tile, int64_t i, int64_t row, int64_t n) {
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows;
  A *z = tile.logits.at + i, *dt = tile.target_grad.at + i;
  const A *t = tile.target.at + i, *class_weight = (const A*)a.class_weight;
  const V zero = set1(A(0)), one = set1(A(1)), inf = set1(-minus_infinity<A>()), y = load(tile.y + i);
  const bool targets = g.loss || g.logprob, probabilities = a.probabilities && targets;

  const V m = load_rows<A>(a.row_max, row, n);
  V log_sum = load_rows<A>(a.row_log_sum, row, n);
  // Of a row with +inf, probabilities are NaN, but exp(z - lse), the derivative of lse alone, is 0 beside them.
  if (!targets && !g.entropy) log_sum = select_eq(m, inf, zero, log_sum);
  const V lse = load_rows<A>(g.lse, row, n), entropy = load_rows<A>(g.entropy, row, n);
  V loss = zero, logprob = load_rows<A>(g.logprob, row, n);
  if (g.loss) loss = (g.loss_stride ? load_rows<A>(g.loss, row, n) : set1(*(const A*)g.loss)) * set1(A(g.loss_scale));
  if (a.target) {
    loss = select_lt(y, zero, zero, loss);
    logprob = select_lt(y, zero, zero, logprob);
  }
  const V keep = loss * set1(A(1 - a.label_smoothing));
  // Without smoothing nothing, as in one pass: 0 times an infinite loss were NaN.
  const V spread = a.label_smoothing != 0 ? loss * set1(A(a.label_smoothing / (double)a.classes)) : zero;

  V hot = zero, coefficient = lse;
  if (probabilities) {
    coefficient = coefficient + loss * load_rows<A>(a.row_mass, row, n);
    coefficient = coefficient - logprob * load_rows<A>(a.row_target_mass, row, n);
  } else if (a.target && targets) {
    const V weighted = keep * weight_of_class<A>(a, y);
    hot = weighted - logprob;
    coefficient = coefficient + weighted + spread * set1(A(a.class_weight_sum)) - logprob;
  }
  if (a.z_loss != 0)
    coefficient = coefficient + select_eq(loss, zero, zero, loss * set1(A(2 * a.z_loss)) * (m + log_sum));
  if (g.entropy)
    coefficient = coefficient - select_eq(entropy, zero, zero, entropy * load_rows<A>(a.row_entropy, row, n));
  // Rows that are ignored have a gradient where lse or entropy has one.
  const V any = select_lt(y, zero, select_eq(lse, zero, select_eq(entropy, zero, zero, one), one), one);

  // One factor for all classes of a row; 1 / sum would differ in its last bit from what forward's log_sum says.
  const V reciprocal = exp(zero - log_sum);
  for (int64_t c = 0; c < a.classes; ++c) {
    const V zc = load(z + c * R), log_p = zc - m - log_sum;
    const A w = class_weight ? class_weight[c] : A(1);
    if (g.grad_probabilities) store(dt + c * R, targets ? log_p * (logprob - keep * set1(w)) : zero);
    if (!g.grad_logits) continue;
    V q = zero, d;
    if (probabilities) {
      const V tc = load(t + c * R);
      q = set1(w) * fma(keep, tc, spread) - logprob * tc;
    } else if (a.target) {
      q = select_eq(y, set1(A(c)), hot, zero);
      if (a.label_smoothing != 0 && g.loss) q = fma(spread, set1(w), q);
    }
    if (g.entropy) {
      const V p = exp(log_p, kLeastLogProbability<A>);
      // p log p first: it is bounded
      d = fma(zero - entropy, p * max(set1(kLeastExponent<A>), log_p), p * coefficient) - q;
    } else {
      d = lane_gradient(exp(zc - m), reciprocal, coefficient, q);
    }
    if (a.target) d = select_eq(any, zero, zero, d);
    if (a.softcap != 0) {
      const V u = zc / set1(A(a.softcap));
      d = d * (one - u * u);
    }
    if (a.logit_scale != 1) d = d * set1(A(a.logit_scale));
    store(z + c * R, d);
  }
}

template <class T>
inline void cross_entropy_backward_few_classes(const CrossEntropyArgs& a, const CrossEntropyGrads& g, int64_t begin,
                                               int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t R = tuning::kLaneRows, W = vec_t<A>::size;
  // Without a gradient that they take part in they are not read: they may hold infinities.
  const bool probabilities = a.probabilities && (g.loss || g.logprob);
  CrossEntropyTile<A> tile;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_cross_entropy_tile<T>(a, probabilities, row, rows, tile);
    for (int64_t i = 0; i < rows; i += W)
      cross_entropy_backward_lanes<A>(a, g, tile, i, row + i, std::min(W, rows - i));
    if (g.grad_logits) store_tile(tile.logits, (T*)g.grad_logits, g.grad_layout, row, rows, a.classes);
    if (g.grad_probabilities)
      store_tile(tile.target_grad, (T*)g.grad_probabilities, g.grad_probability_layout, row, rows, a.classes);
  }
}

// ---- one pass ------------------------------------------------------------------------------------------------------

// The loss's sum and the logits' gradient from one look at a tile, of a class to each row; with the same bits as in two
// passes.
template <class T>
inline CrossEntropyPartial cross_entropy_few_classes_in_one_pass(const CrossEntropyArgs& a, const CrossEntropyGrads& g,
                                                                 int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  constexpr int64_t R = tuning::kLaneRows, W = V::size;
  const V zero = set1(A(0)), upstream = set1(*(const A*)g.loss) * set1(A(g.loss_scale));
  CrossEntropyTile<A> tile;
  TileSums<A> lanes;
  // Rows' numbers between the looks, since a vector's results are waited for longer than they take to store.
  A loss[R], coefficient[R], reciprocal[R], hot[R];
  CompensatedSum losses;
  for (int64_t row = begin; row < end; row += R) {
    const int64_t rows = std::min(R, end - row);
    load_cross_entropy_tile<T>(a, false, row, rows, tile);
    for (int64_t i = 0; i < rows; i += W) sum_lanes<true>(a, tile, i, lanes);
    for (int64_t i = 0; i < rows; i += W) {
      const int64_t n = std::min(W, rows - i);
      const V y = load(tile.y + i), m = load(lanes.max + i), w = weight_of_class<A>(a, y);
      const TileResult<A> result(a, lanes, i, row + i, n);
      V each = zero - w * ((load(lanes.of_target + i) - m) - result.log_sum), c = upstream * w;
      if (a.z_loss != 0) {
        each = fma(set1(A(a.z_loss)) * result.lse, result.lse, each);
        c = c + select_eq(upstream, zero, zero, upstream * set1(A(2 * a.z_loss)) * (m + result.log_sum));
      }
      store(loss + i, select_lt(y, zero, zero, each));
      store(coefficient + i, c);
      store(reciprocal + i, exp(zero - result.log_sum));
      store(hot + i, upstream * w);
    }
    losses.add(sum_of(loss, rows));
    for (int64_t c = 0; c < a.classes; ++c) {
      for (int64_t i = 0; i < rows; i += W) {
        const V y = load(tile.y + i), q = select_eq(y, set1(A(c)), load(hot + i), zero);
        A* z = tile.logits.at + c * R + i;
        const V d = lane_gradient(load(z), load(reciprocal + i), load(coefficient + i), q);
        store(z, select_lt(y, zero, zero, d));
      }
    }
    store_tile(tile.logits, (T*)g.grad_logits, g.grad_layout, row, rows, a.classes);
  }
  return {losses.value(), 0, -1};
}
