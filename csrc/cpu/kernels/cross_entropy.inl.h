// Row kernels of cross-entropy. With z = softcap(logit_scale x), m = max z, L = log sum exp(z - m) and target weights
// q_j (a class weight at the target, spread by label smoothing, or the probabilities), every output is a sum over j:
//   loss = sum_j q_j (L - (z_j - m)) + z_loss lse^2     entropy = L - sum_j p_j (z_j - m)     lse = m + L
// so one pass over the row gives them all, and their gradient is  p_j (a + b log p_j) - q_j  with two numbers per row.
#pragma once
#include "cpu/kernels/cross_entropy_few_classes.inl.h"
#include "cpu/kernels/cross_entropy_logits.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

// z of n logits: the logits themselves where nothing needs doing, else computed into buf.
template <class T, class A>
inline const A* staged_logits(const T* x, int64_t n, A* buf, const LogitTransform<A>& transform) {
  if (transform.identity()) return staged(x, n, buf);
  using V = vec_t<A>;
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(buf + j, transform(load(x + j)));
  if (j < n) store_n(buf + j, transform(load_n(x + j, n - j)), n - j);
  return buf;
}

// Where a row of a range keeps its exponentials, if it does.
template <class A>
inline A* exponentials_at(const CrossEntropyArgs& a, bool kept, int64_t row_of_range) {
  return kept && a.exponentials ? (A*)a.exponentials + row_of_range * tuning::exponentials_of_row(a.classes) : nullptr;
}

// What exponents are counted from: the maximum; 0 where that is infinite, so that a row of -inf sums to 0, and one with
// +inf to infinity, or to NaN if there is a NaN in it.
template <class A>
inline A origin_of(A max) {
  return max - max == A(0) ? max : A(0);
}

// A row's maximum as backward wants it, log sum exp(z - max), and log sum exp z. With +inf in the row all probabilities
// are NaN, as torch's, and log sum exp z is infinite, unless there is a NaN, which replaces the maximum then.
template <class A, class S>
struct RowResult {
  A max;
  S log_sum, lse;
};
template <class A, class S>
inline RowResult<A, S> row_result(A max, S sum) {
  const S log_sum = std::log(sum);
  if (max != -minus_infinity<A>()) return {max, log_sum, max + log_sum};
  return {sum != sum ? A(sum) : max, std::numeric_limits<S>::quiet_NaN(), sum};
}

// sum e and sum e (z - m), e = exp(z - m)
template <class A>
inline void block_entropy_sums(const A* z, int64_t n, A m, double* sum, double* weighted) {
  using V = vec_t<A>;
  V vm = set1(m), least = set1(kLeastExponent<A>), s = set1(A(0)), w = s;
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) {
    // Bounded: a logit of -inf has exponential 0, and 0 times -inf were NaN.
    V t = max(least, load(z + j) - vm), e = exp(t);
    s = s + e;
    w = fma(e, t, w);
  }
  if (j < n) {
    V t = max(least, first_n(load_n(z + j, n - j) - vm, n - j, least)), e = exp(t);
    s = s + e;
    w = fma(e, t, w);
  }
  *sum += reduce_add(s);
  *weighted += reduce_add(w);
}

// sum w (z - m), w = 1 without weights
template <class A>
inline A block_dot(const A* z, const A* weight, int64_t n, A m) {
  using V = vec_t<A>;
  // Two chains of additions: this pass is bound by their latency, not by loads from L1.
  V vm = set1(m), s = set1(A(0)), s1 = s, one = set1(A(1));
  int64_t j = 0;
  for (; j + 2 * V::size <= n; j += 2 * V::size) {
    s = fma(weight ? load(weight + j) : one, load(z + j) - vm, s);
    s1 = fma(weight ? load(weight + j + V::size) : one, load(z + j + V::size) - vm, s1);
  }
  for (; j + V::size <= n; j += V::size) s = fma(weight ? load(weight + j) : one, load(z + j) - vm, s);
  if (j < n) {
    V zero = set1(A(0));
    V t = first_n(load_n(z + j, n - j) - vm, n - j, zero);
    s1 = fma(weight ? load_n(weight + j, n - j) : one, t, s1);
  }
  return reduce_add(s + s1);
}

template <class A>
inline A block_sum(const A* p, int64_t n) {
  using V = vec_t<A>;
  V s = set1(A(0));
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) s = s + load(p + j);
  if (j < n) s = s + load_n(p + j, n - j);
  return reduce_add(s);
}

// Effective target weights of probabilities: q = w ((1 - eps) t + eps / C).
struct TargetSums {
  double q_dot, q_mass, t_dot, t_mass;
};

template <class A>
inline TargetSums block_target_sums(const A* z, const A* t, const A* weight, int64_t n, A m, A keep, A spread) {
  using V = vec_t<A>;
  V vm = set1(m), vkeep = set1(keep), vspread = set1(spread), zero = set1(A(0)), one = set1(A(1));
  V q_dot = zero, q_mass = zero, t_dot = zero, t_mass = zero;
  for (int64_t j = 0; j < n; j += V::size) {
    int64_t c = std::min<int64_t>(V::size, n - j);
    bool full = c == V::size;
    V tv = full ? load(t + j) : load_n(t + j, c);
    V zv = full ? load(z + j) - vm : first_n(load_n(z + j, c) - vm, c, zero);
    V wv = !weight ? one : full ? load(weight + j) : load_n(weight + j, c);
    V q = wv * fma(vkeep, tv, vspread);
    // `spread` has made something of the lanes beyond the last.
    if (!full) q = first_n(q, c, zero);
    q_dot = fma(q, zv, q_dot);
    q_mass = q_mass + q;
    t_dot = fma(tv, zv, t_dot);
    t_mass = t_mass + tv;
  }
  return {reduce_add(q_dot), reduce_add(q_mass), reduce_add(t_dot), reduce_add(t_mass)};
}

// First position of a NaN where there is one, else of the value m, which blocks before `from` are known not to hold.
template <class T, class A>
inline int64_t first_maximum(const T* x, int64_t n, int64_t from, A m, bool nan, const LogitTransform<A>& transform) {
  // Looked for afterwards, and only where it is asked for: to carry an index along the maximum costs every row.
  A buf[kBlock];
  for (int64_t j = nan ? 0 : from; j < n; j += kBlock) {
    int64_t count = std::min<int64_t>(kBlock, n - j);
    const A* z = staged_logits(x + j, count, buf, transform);
    for (int64_t i = 0; i < count; ++i)
      if (nan ? z[i] != z[i] : z[i] == m) return j + i;
  }
  return 0;
}

// Whether backward takes the exponentials that forward made: of loss, lse and logprob of a class alone, of logits as
// they are.
inline bool keeps_exponentials(const CrossEntropyArgs& a) {
  return !a.probabilities && !a.row_entropy && a.label_smoothing == 0 && a.logit_scale == 1 && a.softcap == 0;
}

// One row's loss and statistics; its exponentials too where `exponentials` is not null, with the maxima of blocks that
// they are relative to behind them. Returns the row's term of the mean's denominator, and its loss through `loss`. E:
// the logits' own type, of which a tile's rows are copies.
template <class E, class T>
inline double cross_entropy_row(const T* x, const T* probabilities, const CrossEntropyArgs& a,
                                const CrossEntropyOutputs& out, int64_t row, acc_t<T>* exponentials, double* loss) {
  using A = acc_t<T>;
  const LogitTransform<A> transform = {A(a.logit_scale), A(a.softcap)};
  const A* weight = (const A*)a.class_weight;
  const A keep = A(1 - a.label_smoothing), spread = A(a.label_smoothing / (double)a.classes);
  const bool by_class = a.target != nullptr, ignored = by_class && a.target[row] == a.ignore_index;
  const int64_t y = by_class && !ignored ? a.target[row] : -1;
  const bool smooth = y >= 0 && spread != A(0);

  // Blocks of L1: each is read several times, memory once.
  A zbuf[kBlock], tbuf[kBlock];
  A m = minus_infinity<A>(), zy = 0;
  double sum = 0, weighted = 0, dot = 0, weight_so_far = 0;
  TargetSums target = {0, 0, 0, 0};
  int64_t max_block = 0;
  for (int64_t j = 0; j < a.classes; j += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, a.classes - j);
    const A* z = staged_logits(x + j, count, zbuf, transform);
    const A bm = block_max(z, count);
    // False for NaN, which the sum carries on.
    if (bm > m) {
      // All sums so far are relative to the old maximum (to 0 before there was one).
      const bool started = m != minus_infinity<A>();
      const double shift = (double)origin_of(m) - (double)origin_of(bm);
      const double shrink = started ? std::exp(shift) : 0;
      // shift may overflow, or the sum be infinite: without anything left of it there is no 0 * inf.
      weighted = shrink > 0 ? shrink * (weighted + shift * sum) : sum * 0;
      sum *= shrink;
      dot += shift * weight_so_far;
      target.q_dot += shift * target.q_mass;
      target.t_dot += shift * target.t_mass;
      m = bm;
      max_block = j;
    }
    const A origin = origin_of(m);
    // One of three ways to the sum, by what else is made of the exponentials.
    if (a.row_entropy) {
      block_entropy_sums(z, count, origin, &sum, &weighted);
    } else if (exponentials) {
      sum += block_exp_sum<E, true>(z, count, origin, x + j + kBlock, exponentials + j);
      exponentials[a.classes + j / kBlock] = m;
    } else {
      sum += block_exp_sum<E>(z, count, origin, x + j + kBlock);
    }
    if (smooth) {
      dot += block_dot(z, weight ? weight + j : nullptr, count, origin);
      // Only reached for all blocks but the last when the maximum may still move.
      if (j + count < a.classes) weight_so_far += weight ? block_sum(weight + j, count) : A(count);
    }
    if (probabilities) {
      const A* t = staged(probabilities + j, count, tbuf);
      TargetSums s = block_target_sums(z, t, weight ? weight + j : nullptr, count, origin, keep, spread);
      target.q_dot += s.q_dot;
      target.q_mass += s.q_mass;
      target.t_dot += s.t_dot;
      target.t_mass += s.t_mass;
    }
    // While it is in L1, and before a gradient may replace it.
    if (y >= j && y < j + count) zy = z[y - j];
  }

  // In double precision, once a row: a float's logarithm would cost a loss near 0 its digits.
  const RowResult<A, double> result = row_result(m, sum);
  const double log_sum = result.log_sum, lse = result.lse;
  ((A*)a.row_max)[row] = result.max;
  ((A*)a.row_log_sum)[row] = A(log_sum);
  if (a.row_entropy) ((A*)a.row_entropy)[row] = A(log_sum - weighted / sum);
  if (out.lse) ((A*)out.lse)[row] = A(lse);
  if (out.argmax) out.argmax[row] = first_maximum(x, a.classes, max_block, m, sum != sum, transform);

  double denominator = 0, row_loss = 0, logprob = 0;
  if (probabilities) {
    ((A*)a.row_mass)[row] = A(target.q_mass);
    ((A*)a.row_target_mass)[row] = A(target.t_mass);
    row_loss = target.q_mass * log_sum - target.q_dot;
    logprob = target.t_dot - target.t_mass * log_sum;
    denominator = 1;
  } else if (y >= 0) {
    denominator = weight ? weight[y] : 1;
    // Not zy - lse: of large logits that has few digits left.
    logprob = ((double)zy - (double)m) - log_sum;
    row_loss = -keep * denominator * logprob;
    if (smooth) row_loss += spread * (a.class_weight_sum * log_sum - dot);
  }
  if (a.z_loss != 0 && !ignored) row_loss += a.z_loss * lse * lse;
  if (out.logprob) ((A*)out.logprob)[row] = A(logprob);
  if (out.loss) ((A*)out.loss)[row] = A(row_loss);
  *loss = row_loss;
  return denominator;
}

// ---- ranges of rows ------------------------------------------------------------------------------------------------

template <class T>
inline CrossEntropyPartial cross_entropy_forward(const CrossEntropyArgs& a, const CrossEntropyOutputs& out,
                                                 int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t bad_row = first_bad_row(a, begin, end);
  if (bad_row >= 0) return {0, 0, bad_row};
  if (are_few(a.classes)) return cross_entropy_few_classes<T>(a, out, begin, end);
  CompensatedSum losses, weights;
  const T *x = (const T*)a.logits, *t = (const T*)a.probabilities;
  const bool direct = a.layout.class_stride == 1 && (!t || a.probability_layout.class_stride == 1);
  A *x_tile = (A*)a.scratch, *t_tile = x_tile + tuning::kTileRows * a.classes;
  const bool kept = keeps_exponentials(a);
  for (int64_t r = begin, rows; r < end; r += rows) {
    double loss;
    if (direct) {
      rows = 1;
      const T* probabilities = t ? t + a.probability_layout.offset(r) : nullptr;
      weights.add(cross_entropy_row<T>(x + a.layout.offset(r), probabilities, a, out, r,
                                       exponentials_at<A>(a, kept, r - begin), &loss));
      losses.add(loss);
      continue;
    }
    rows = tile_rows(a.layout, r, end);
    gather_tile(x, a.layout, r, rows, a.classes, x_tile);
    if (t) gather_tile(t, a.probability_layout, r, rows, a.classes, t_tile);
    for (int64_t i = 0; i < rows; ++i) {
      const A* probabilities = t ? t_tile + i * a.classes : nullptr;
      weights.add(cross_entropy_row<T>(x_tile + i * a.classes, probabilities, a, out, r + i,
                                       exponentials_at<A>(a, kept, r + i - begin), &loss));
      losses.add(loss);
    }
  }
  return {losses.value(), weights.value(), -1};
}
