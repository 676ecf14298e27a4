// Gradients of cross-entropy's row kernels: one read of the logits and of the row's statistics, one write.
#pragma once
#include "cpu/kernels/cross_entropy.inl.h"
#include "cpu/kernels/cross_entropy_few_classes.inl.h"
#include "cpu/kernels/cross_entropy_logits.inl.h"
#include "cpu/kernels/math.inl.h"
#include "cpu/kernels/prelude.h"
#include "cpu/kernels/rows.inl.h"

// The gradient at a vector of logits: p (a + b log p) - w spread - q(t), through the soft cap.
template <class T>
struct LogitGradient {
  using A = acc_t<T>;
  using V = vec_t<A>;
  A m, log_sum, a, b;
  A spread, keep, logprob;  // q = w (keep t + spread) - logprob t
  const A *z, *t, *weight;  // of the block; t and weight may be null
  A scale, cap;

  template <bool full>
  V at(int64_t j, int64_t n) const {
    V zv = full ? load(z + j) : load_n(z + j, n);
    V log_p = zv - set1(m) - set1(log_sum);
    V p = exp(log_p, kLeastLogProbability<A>), g;
    if (b != A(0))
      g = fma(set1(b), p * max(set1(kLeastExponent<A>), log_p), p * set1(a));  // p log p first: it is bounded
    else
      g = p * set1(a);
    // The same for all of a row's blocks, so that branches are foretold.
    if (t || spread != A(0)) {
      V w = !weight ? set1(A(1)) : full ? load(weight + j) : load_n(weight + j, n);
      if (t) {
        V tv = full ? load(t + j) : load_n(t + j, n);
        g = g - (w * fma(set1(keep), tv, set1(spread)) - set1(logprob) * tv);
      } else {
        g = g - w * set1(spread);
      }
    }
    if (cap != A(0)) {
      V u = zv / set1(cap);
      g = g * (set1(A(1)) - u * u);
    }
    return g * set1(scale);
  }
};

// The common case: class indices, no smoothing, no soft cap. dz = a p, where p is an exponential e relative to the
// maximum of the blocks so far, times what that is to the row's sum: exactly so whether forward has kept e or not.
template <class E, class T, bool kept>
struct PlainGradient {
  using A = acc_t<T>;
  using V = vec_t<A>;
  A origin, least, factor;  // below `least`, e counts as 0
  const A* from;            // exponentials, or logits

  PlainGradient(A origin, A m, A log_sum, A a, const A* from)
      : origin(origin),
        least(exp_one(kLeastLogProbability<A> - (origin - m - log_sum))),
        factor(exp_one(origin - m - log_sum) * a),
        from(from) {}

  template <bool full>
  V at(int64_t j, int64_t n) const {
    V e = full ? load(from + j) : load_n(from + j, n);
    if constexpr (!kept) e = exp_for<E>(e - set1(origin));
    return select_lt(e, set1(least), set1(A(0)), e) * set1(factor);
  }
};
// The same of a row whose maximum is not finite, where exponentials relative to 0 are no use.
template <class T>
struct DegenerateGradient {
  using A = acc_t<T>;
  using V = vec_t<A>;
  A m, log_sum, a;
  const A* z;
  template <bool full>
  V at(int64_t j, int64_t n) const {
    V zv = full ? load(z + j) : load_n(z + j, n);
    return exp(zv - set1(m) - set1(log_sum), kLeastLogProbability<A>) * set1(a);
  }
};

// d loss / d t_j = log p_j (logprob - loss w_j)
template <class T>
struct ProbabilityGradient {
  using A = acc_t<T>;
  using V = vec_t<A>;
  A m, log_sum, loss, logprob;
  const A *z, *weight;
  template <bool full>
  V at(int64_t j, int64_t n) const {
    V log_p = (full ? load(z + j) : load_n(z + j, n)) - set1(m) - set1(log_sum);
    V w = !weight ? set1(A(1)) : full ? load(weight + j) : load_n(weight + j, n);
    return log_p * (set1(logprob) - set1(loss) * w);
  }
};

// Write n values of f to p; past the caches when asked (kStreamBytes tells when that pays), between a head and a tail
// that reach alignment.
template <class T, class F>
inline void write_block(T* p, int64_t n, const F& f, bool past_caches) {
  using V = vec_t<T>;
  int64_t j = 0;
  if (past_caches) {
    // A pair of vectors, which of half types makes a whole one: half a line at a time took twice as long (Zen 4).
    constexpr int64_t bytes = 2 * V::size * sizeof(T);
    const int64_t head = std::min<int64_t>(n, (bytes - (int64_t)((uintptr_t)p % bytes)) % bytes / (int64_t)sizeof(T));
    for (; j + V::size <= head; j += V::size) store(p + j, f.template at<true>(j, V::size));
    if (j < head) store_n(p + j, f.template at<false>(j, head - j), head - j);
    for (j = head; j + 2 * V::size <= n; j += 2 * V::size)
      stream(p + j, f.template at<true>(j, V::size), f.template at<true>(j + V::size, V::size));
  }
  for (; j + V::size <= n; j += V::size) store(p + j, f.template at<true>(j, V::size));
  if (j < n) store_n(p + j, f.template at<false>(j, n - j), n - j);
}

template <class E, class T>
inline void cross_entropy_backward_row(const T* x, const T* probabilities, T* dx, T* dt, const CrossEntropyArgs& a,
                                       const CrossEntropyGrads& g, int64_t row, const acc_t<T>* exponentials) {
  using A = acc_t<T>;
  const LogitTransform<A> transform = {A(a.logit_scale), A(a.softcap)};
  const A* weight = (const A*)a.class_weight;
  const bool by_class = a.target != nullptr, ignored = by_class && a.target[row] == a.ignore_index;
  const int64_t y = by_class && !ignored ? a.target[row] : -1;
  // Of a row with +inf, probabilities are NaN, but exp(z - lse), the derivative of lse alone, is 0 beside them.
  const bool targets = g.loss || g.logprob;
  const A m = ((const A*)a.row_max)[row];
  const bool apart = !targets && !g.entropy && m == -minus_infinity<A>();
  const A log_sum = apart ? A(0) : ((const A*)a.row_log_sum)[row];
  const A loss = g.loss && !ignored ? ((const A*)g.loss)[row * g.loss_stride] * A(g.loss_scale) : A(0);
  const A lse = g.lse ? ((const A*)g.lse)[row] : A(0), entropy = g.entropy ? ((const A*)g.entropy)[row] : A(0);
  const A logprob = g.logprob && !ignored ? ((const A*)g.logprob)[row] : A(0);
  const A keep = loss * A(1 - a.label_smoothing);
  // Without smoothing nothing: 0 times an infinite loss were NaN.
  const A spread = a.label_smoothing != 0 ? loss * A(a.label_smoothing / (double)a.classes) : A(0);

  A mass = 0, target_mass = 0, hot = 0;
  if (!targets) {
    probabilities = nullptr;  // nothing times what they hold, which may be infinite
  } else if (probabilities) {
    mass = loss * ((const A*)a.row_mass)[row];
    target_mass = ((const A*)a.row_target_mass)[row];
  } else if (y >= 0) {
    hot = keep * (weight ? weight[y] : A(1)) - logprob;
    mass = keep * (weight ? weight[y] : A(1)) + spread * A(a.class_weight_sum);
    target_mass = 1;
  }
  A coefficient = mass + lse - logprob * target_mass;
  if (a.z_loss != 0 && loss != A(0)) coefficient += loss * A(2 * a.z_loss) * (m + log_sum);
  if (entropy != A(0)) coefficient -= entropy * ((const A*)a.row_entropy)[row];

  // Zeros without a look at the logits, which may hold anything.
  const bool nothing = ignored && lse == A(0) && entropy == A(0);
  const bool plain = !probabilities && spread == A(0) && entropy == A(0) && transform.identity();
  // Exponentials relative to a maximum want one that is finite.
  const bool finite = origin_of(m) == m;
  const bool kept = exponentials && plain && finite && !dt;
  A zbuf[kBlock], tbuf[kBlock], so_far = minus_infinity<A>();
  for (int64_t j = 0; j < a.classes; j += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, a.classes - j);
    const bool has_target = y >= j && y < j + count;
    if (nothing) {
      if (dx) std::memset((void*)(dx + j), 0, count * sizeof(T));
      continue;
    }
    if (dt && !targets) std::memset((void*)(dt + j), 0, count * sizeof(T));
    if (kept) {
      const A zy = has_target ? load_one(x + y) : A(0);  // before dx, which may be x, is written
      const PlainGradient<E, T, true> f(origin_of(exponentials[a.classes + j / kBlock]), m, log_sum, coefficient,
                                        exponentials + j);
      write_block(dx + j, count, f, g.stream);
      if (has_target) store_one(dx + y, coefficient * exp_one(zy - m - log_sum) - hot);
      continue;
    }
    const A* z = staged_logits(x + j, count, zbuf, transform);
    const A* w = weight ? weight + j : nullptr;
    if (dt && targets) {
      ProbabilityGradient<T> f = {m, log_sum, keep, logprob, z, w};
      write_block(dt + j, count, f, false);
    }
    if (!dx) continue;
    const A zy = has_target ? z[y - j] : A(0);  // before dx, which may be x, is written
    if (plain) {
      if (finite) {
        // As in forward, whose exponentials were relative to the maximum up to there: the same bits, kept or not.
        so_far = std::max(so_far, block_max(z, count));
        write_block(dx + j, count, PlainGradient<E, T, false>(origin_of(so_far), m, log_sum, coefficient, z), g.stream);
      } else {
        write_block(dx + j, count, DegenerateGradient<T>{m, log_sum, coefficient, z}, g.stream);
      }
      if (has_target) store_one(dx + y, coefficient * exp_one(zy - m - log_sum) - hot);
    } else {
      const A* t = probabilities ? staged(probabilities + j, count, tbuf) : nullptr;
      LogitGradient<T> f = {m,       log_sum, coefficient, -entropy, spread,          keep,
                            logprob, z,       t,           w,        transform.scale, transform.cap};
      write_block(dx + j, count, f, g.stream);
      if (has_target) {
        // The class's own entry again, with the one-hot term inside, so that it is rounded once.
        A log_p = zy - m - log_sum, u = transform.cap == A(0) ? A(0) : zy / transform.cap;
        const A p = exp_one(log_p);
        A value = p * coefficient - entropy * (p * std::max(kLeastExponent<A>, log_p));
        value -= spread * (weight ? weight[y] : A(1)) + hot;
        store_one(dx + y, value * (1 - u * u) * transform.scale);
      }
    }
  }
}

// ---- ranges of rows ------------------------------------------------------------------------------------------------

template <class T>
inline int64_t cross_entropy_backward(const CrossEntropyArgs& a, const CrossEntropyGrads& g, int64_t begin,
                                      int64_t end) {
  const int64_t bad_row = first_bad_row(a, begin, end);
  if (bad_row >= 0) return bad_row;
  if (are_few(a.classes)) {
    cross_entropy_backward_few_classes<T>(a, g, begin, end);
    return -1;
  }
  using A = acc_t<T>;
  const T *x = (const T*)a.logits, *t = (const T*)a.probabilities;
  T *dx = (T*)g.grad_logits, *dt = (T*)g.grad_probabilities;
  const bool direct = a.layout.class_stride == 1 && (!t || a.probability_layout.class_stride == 1) &&
                      (!dx || g.grad_layout.class_stride == 1) && (!dt || g.grad_probability_layout.class_stride == 1);
  A *x_tile = (A*)a.scratch, *t_tile = x_tile + tuning::kTileRows * a.classes;
  A* dt_tile = t_tile + tuning::kTileRows * a.classes;
  const bool kept = keeps_exponentials(a);
  for (int64_t r = begin, rows; r < end; r += rows) {
    if (direct) {
      rows = 1;
      cross_entropy_backward_row<T>(x + a.layout.offset(r), t ? t + a.probability_layout.offset(r) : nullptr,
                                    dx ? dx + g.grad_layout.offset(r) : nullptr,
                                    dt ? dt + g.grad_probability_layout.offset(r) : nullptr, a, g, r,
                                    exponentials_at<A>(a, kept, r - begin));
      continue;
    }
    rows = tile_rows(a.layout, r, end);
    gather_tile(x, a.layout, r, rows, a.classes, x_tile);
    if (t) gather_tile(t, a.probability_layout, r, rows, a.classes, t_tile);
    CrossEntropyGrads in_cache = g;
    // Streamed stores are for memory; tiles are read again at once.
    in_cache.stream = false;
    for (int64_t i = 0; i < rows; ++i) {
      A* row = x_tile + i * a.classes;  // the logits' gradient takes their place
      cross_entropy_backward_row<T>(row, t ? t_tile + i * a.classes : nullptr, dx ? row : nullptr,
                                    dt ? dt_tile + i * a.classes : nullptr, a, in_cache, r + i,
                                    exponentials_at<A>(a, kept, r + i - begin));
    }
    if (dx) scatter_tile(x_tile, dx, g.grad_layout, r, rows, a.classes);
    if (dt) scatter_tile(dt_tile, dt, g.grad_probability_layout, r, rows, a.classes);
  }
  if (g.stream) stream_fence();
  return -1;
}

// Whether few classes give loss and gradient from one look at a tile: for a class to each row, and of the loss alone.
inline bool in_one_pass(const CrossEntropyArgs& a, const CrossEntropyOutputs& out, const CrossEntropyGrads& g) {
  return are_few(a.classes) && a.target && keeps_exponentials(a) && g.grad_logits && !g.grad_probabilities && g.loss &&
         !g.loss_stride && !g.lse && !g.entropy && !g.logprob && !out.loss && !out.lse && !out.logprob && !out.argmax;
}

// Of each range of rows losses first, and then gradients, which find in cache what those have left: logits, statistics
// and, as far as a.exponentials has room, exponentials.
template <class T>
inline CrossEntropyPartial cross_entropy_forward_backward(const CrossEntropyArgs& a, const CrossEntropyOutputs& out,
                                                          const CrossEntropyGrads& g, int64_t begin, int64_t end) {
  if (in_one_pass(a, out, g)) {
    const int64_t bad_row = first_bad_row(a, begin, end);
    return bad_row < 0 ? cross_entropy_few_classes_in_one_pass<T>(a, g, begin, end)
                       : CrossEntropyPartial{0, 0, bad_row};
  }
  const CrossEntropyPartial sums = cross_entropy_forward<T>(a, out, begin, end);
  if (sums.bad_row < 0) cross_entropy_backward<T>(a, g, begin, end);
  return sums;
}
