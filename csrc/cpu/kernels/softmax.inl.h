// Row kernels of softmax, log-softmax and log-sum-exp, and what cross-entropy shares with them. A row is read in blocks
// that fit L1: first its maximum, then the sum of exponentials, the running sum being rescaled when the maximum grows
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). So a row longer than the caches is read
// from memory once.

constexpr int64_t kBlock = tuning::kBlockVectors * f32v::size;

template <class V>
using scalar_t = typename V::scalar;
template <class A>
inline A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

template <class A>
inline A block_max(const A* z, int64_t n) {
  using V = vec_t<A>;
  V m0 = set1(minus_infinity<A>()), m1 = m0;
  int64_t j = 0;
  for (; j + 2 * V::size <= n; j += 2 * V::size) {
    m0 = max(load(z + j), m0);
    m1 = max(load(z + j + V::size), m1);
  }
  for (; j + V::size <= n; j += V::size) m0 = max(load(z + j), m0);
  if (j < n) m1 = max(first_n(load_n(z + j, n - j), n - j, m1), m1);
  return reduce_max(max(m0, m1));
}

// Sum of exp(z - m). Lanes past the end count exp(-inf) = 0. Meanwhile what follows at `next` is fetched (past the
// end of the row that is a hint without effect): memory would idle during this pass otherwise.
template <class T, class A>
inline A block_exp_sum(const A* z, int64_t n, A m, const T* next) {
  using V = vec_t<A>;
  constexpr int64_t line = 64 / sizeof(T);
  V vm = set1(m), s0 = set1(A(0)), s1 = s0;
  int64_t j = 0;
  for (; j + 2 * V::size <= n; j += 2 * V::size) {
    __builtin_prefetch(next + j);
    if constexpr (line < 2 * V::size) __builtin_prefetch(next + j + line);
    s0 = s0 + exp(load(z + j) - vm);
    s1 = s1 + exp(load(z + j + V::size) - vm);
  }
  for (; j + V::size <= n; j += V::size) s0 = s0 + exp(load(z + j) - vm);
  if (j < n) s1 = s1 + exp(first_n(load_n(z + j, n - j) - vm, n - j, set1(minus_infinity<A>())));
  return reduce_add(s0 + s1);
}

// A block of n elements in accumulator type: the elements themselves where nothing needs doing, else a copy in buf.
template <class T, class A>
inline const A* staged(const T* p, int64_t n, A* buf) {
  if constexpr (std::is_same_v<T, A>) {
    return p;
  } else {
    using V = vec_t<A>;
    int64_t j = 0;
    for (; j + V::size <= n; j += V::size) store(buf + j, load(p + j));
    if (j < n) store_n(buf + j, load_n(p + j, n - j), n - j);
    return buf;
  }
}

// Maximum of a row, and the logarithm of the sum of exp(z - maximum). They are kept apart because max + log loses the
// digits of log when the maximum is large.
template <class A>
struct RowStats {
  A max;
  double log_sum;
};

template <class T>
inline RowStats<acc_t<T>> row_stats(const T* x, int64_t n) {
  using A = acc_t<T>;
  A buf[kBlock];
  A m = minus_infinity<A>();
  double sum = 0;
  for (int64_t j = 0; j < n; j += kBlock) {
    int64_t count = std::min<int64_t>(kBlock, n - j);
    const A* z = staged(x + j, count, buf);
    A bm = block_max(z, count);
    if (bm > m) {
      sum = sum == 0 ? 0 : sum * std::exp((double)m - (double)bm);
      m = bm;
    }
    // With a maximum of -inf the block holds only -inf, which adds nothing, or NaN, which must be seen.
    sum += block_exp_sum(z, count, m == minus_infinity<A>() ? A(0) : m, x + j + kBlock);
  }
  return {m, std::log(sum)};
}

// y = exp(x - max) / sum, or x - max - log(sum).
template <class T>
inline void softmax_row(const T* x, T* y, int64_t n, bool log) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  bool once = !log && std::is_same_v<T, A> && n * (int64_t)sizeof(A) <= tuning::kCachedRowBytes;
  if (once) {
    // Exponentiate into y, then scale y while it is still in cache.
    if constexpr (std::is_same_v<T, A>) {
      V vm = set1(block_max(x, n));
      double total = 0;
      int64_t j = 0;
      for (int64_t end = 0; end < n;) {
        end = std::min(n, end + kBlock);
        V sum = set1(A(0));
        for (; j + V::size <= end; j += V::size) {
          V e = exp(load(x + j) - vm);
          store(y + j, e);
          sum = sum + e;
        }
        if (j < end) {
          V e = exp(first_n(load_n(x + j, end - j) - vm, end - j, set1(minus_infinity<A>())));
          store_n(y + j, e, end - j);
          sum = sum + e;
        }
        total += reduce_add(sum);
      }
      V scale = set1(A(1 / total));
      for (j = 0; j + V::size <= n; j += V::size) store(y + j, load(y + j) * scale);
      if (j < n) store_n(y + j, load_n(y + j, n - j) * scale, n - j);
    }
    return;
  }
  RowStats<A> stats = row_stats(x, n);
  V m = set1(stats.max), log_sum = set1(A(stats.log_sum));
  int64_t j = 0;
  if (log) {
    for (; j + V::size <= n; j += V::size) store(y + j, load(x + j) - m - log_sum);
    if (j < n) store_n(y + j, load_n(x + j, n - j) - m - log_sum, n - j);
  } else {
    for (; j + V::size <= n; j += V::size) store(y + j, exp(load(x + j) - m - log_sum));
    if (j < n) store_n(y + j, exp(load_n(x + j, n - j) - m - log_sum), n - j);
  }
}

// softmax: dx = y (g - sum g y); log-softmax: dx = g - exp(y) sum g.
template <class T>
inline void softmax_backward_row(const T* g, const T* y, T* dx, int64_t n, bool log) {
  using A = acc_t<T>;
  using V = vec_t<A>;
  double total = 0;
  int64_t j = 0;
  for (int64_t end = 0; end < n;) {
    end = std::min(n, end + kBlock);
    V s = set1(A(0));
    for (; j + V::size <= end; j += V::size) s = log ? s + load(g + j) : fma(load(g + j), load(y + j), s);
    if (j < end) s = log ? s + load_n(g + j, end - j) : fma(load_n(g + j, end - j), load_n(y + j, end - j), s);
    total += reduce_add(s);
    j = end;
  }
  V sum = set1(A(total));
  for (j = 0; j + V::size <= n; j += V::size) {
    V gv = load(g + j), yv = load(y + j);
    store(dx + j, log ? gv - exp(yv) * sum : yv * (gv - sum));
  }
  if (j < n) {
    V gv = load_n(g + j, n - j), yv = load_n(y + j, n - j);
    store_n(dx + j, log ? gv - exp(yv) * sum : yv * (gv - sum), n - j);
  }
}

// Log-sum-exp: dx = g exp(x - lse); NaN for a row of -inf, as torch's.
template <class T>
inline void logsumexp_backward_row(const T* x, T* dx, int64_t n, acc_t<T> g, acc_t<T> lse) {
  using V = vec_t<T>;
  V gv = set1(g), lv = set1(lse);
  int64_t j = 0;
  for (; j + V::size <= n; j += V::size) store(dx + j, gv * exp(load(x + j) - lv));
  if (j < n) store_n(dx + j, gv * exp(load_n(x + j, n - j) - lv), n - j);
}

// ---- classes far apart, rows adjacent: lanes are rows
// ----------------------------------------------------------------

template <class T>
inline vec_t<T> load_lanes(const T* p, int64_t lanes) {
  return lanes == vec_t<T>::size ? load(p) : load_n(p, lanes);
}
template <class T>
inline void store_lanes(T* p, vec_t<T> x, int64_t lanes) {
  if (lanes == vec_t<T>::size)
    store(p, x);
  else
    store_n(p, x, lanes);
}

// Softmax of `lanes` rows whose classes are x_step and y_step apart.
template <class T>
inline void softmax_lanes(const T* x, int64_t x_step, T* y, int64_t y_step, int64_t n, int64_t lanes, bool log) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  V m = set1(minus_infinity<A>()), sum = set1(A(0));
  for (int64_t c = 0; c < n; ++c) m = max(load_lanes(x + c * x_step, lanes), m);
  for (int64_t c = 0; c < n; c += tuning::kChain) {
    V chain = set1(A(0));
    for (int64_t i = c; i < std::min(n, c + tuning::kChain); ++i)
      chain = chain + exp(load_lanes(x + i * x_step, lanes) - m);
    sum = sum + chain;
  }
  A lane[V::size];
  store(lane, sum);
  for (int i = 0; i < V::size; ++i) lane[i] = log ? std::log(lane[i]) : 1 / lane[i];
  const V finish = load(lane);
  for (int64_t c = 0; c < n; ++c) {
    V t = load_lanes(x + c * x_step, lanes) - m;
    store_lanes(y + c * y_step, log ? t - finish : exp(t) * finish, lanes);
  }
}

template <class T>
inline void softmax_backward_lanes(const T* g, int64_t g_step, const T* y, int64_t y_step, T* dx, int64_t dx_step,
                                   int64_t n, int64_t lanes, bool log) {
  using A = acc_t<T>;
  using V = vec_t<T>;
  V sum = set1(A(0));
  for (int64_t c = 0; c < n; c += tuning::kChain) {
    V chain = set1(A(0));
    for (int64_t i = c; i < std::min(n, c + tuning::kChain); ++i) {
      V gv = load_lanes(g + i * g_step, lanes);
      chain = log ? chain + gv : fma(gv, load_lanes(y + i * y_step, lanes), chain);
    }
    sum = sum + chain;
  }
  for (int64_t c = 0; c < n; ++c) {
    V gv = load_lanes(g + c * g_step, lanes), yv = load_lanes(y + c * y_step, lanes);
    store_lanes(dx + c * dx_step, log ? gv - exp(yv) * sum : yv * (gv - sum), lanes);
  }
}
