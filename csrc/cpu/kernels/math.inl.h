// Elementary functions over the SIMD vocabulary, included inside each ISA's namespace, after Cephes (S. Moshier, 1989)
// but for what is fitted here. exp errs by less than 2 ulp, lets NaN through, and is 0 where the result would be
// subnormal or nearly so (below 2^-125.5, of doubles 2^-1021.5): far from the maximum that is most lanes, and a
// subnormal result costs a microcode assist of 150 cycles. Doubles take erfc from libm.
#pragma once
#include "cpu/kernels/prelude.h"

template <class T>
struct vector_for {
  using type = f32v;
};
template <>
struct vector_for<double> {
  using type = f64v;
};
template <class T>
using vec_t = typename vector_for<T>::type;
template <class V>
using scalar_t = typename V::scalar;

// Whole vectors, or their first n lanes where n is less.
template <class T>
inline vec_t<T> load_up_to(const T* p, int64_t n) {
  return n == vec_t<T>::size ? load(p) : load_n(p, n);
}
template <class T>
inline void store_up_to(T* p, vec_t<T> x, int64_t n) {
  n == vec_t<T>::size ? store(p, x) : store_n(p, x, n);
}

// x between bounds as n log(2) and a rest, n the nearest whole number. 2^n itself may be too large for the type:
// exponentials are computed twice as large and multiplied by half of it.
template <class V>
struct PowerOfTwo {
  V t, n, half;

  PowerOfTwo(V x, V least, scalar_t<V> most) {
    using A = scalar_t<V>;
    // A number this large is whole, and its last bits are n - 1 as an exponent is stored.
    const V to_exponent = set1(sizeof(A) == 4 ? A(0x1.8p23 + 126) : A(0x1.8p52 + 1022));
    t = min(set1(most), max(least, x));
    const V counted = fma(t, set1(A(1.4426950408889634)), to_exponent);
    n = counted - to_exponent;
    half = last_bits_as_exponent(counted);
  }
};

// Results of exponents below `lowest` are 0. exp(r) of |r| <= log(2) / 2 is fitted to 3e-9, and 1 at 0.
inline f32v exp(f32v x, float lowest = -86.98f) {
  const f32v least = set1(lowest);
  // Above 89 the result is infinite.
  const PowerOfTwo<f32v> power(x, least, 89.0f);
  // log(2) in two summands, of which the first has few enough bits that n times it is exact.
  f32v r = fma(power.n, set1(-0.693359375f), power.t);
  r = fma(power.n, set1(2.12194440e-4f), r);
  f32v p = set1(2 * 1.381453127e-3f);
  p = fma(p, r, set1(2 * 8.368745446e-3f));
  p = fma(p, r, set1(2 * 4.166839272e-2f));
  p = fma(p, r, set1(2 * 1.666652113e-1f));
  p = fma(p, r, set1(2 * 4.999999404e-1f));
  p = fma(p, r, set1(2.0f));
  p = fma(p, r, set1(2.0f));
  return select_lt(x, least, set1(0.0f), p * power.half);
}

// The same to 5e-7 near 0 and below: for results that are rounded to a half type, of 8 or 11 bits, and sums of them;
// not for differences.
inline f32v exp_short(f32v x) {
  const f32v least = set1(-86.98f);
  const PowerOfTwo<f32v> power(x, least, 89.0f);
  // One summand: what it loses is less than a half type can tell.
  f32v r = fma(power.n, set1(-0.693147181f), power.t);
  f32v p = set1(2 * 6.953325070e-03f);
  p = fma(p, r, set1(2 * 4.187527193e-02f));
  p = fma(p, r, set1(2 * 1.668765492e-01f));
  p = fma(p, r, set1(2 * 4.999937550e-01f));
  p = fma(p, r, set1(2 * 9.999937243e-01f));
  p = fma(p, r, set1(2.0f));
  return select_lt(x, least, set1(0.0f), p * power.half);
}
// As results of type T need it.
template <class T, class V>
inline V exp_for(V x) {
  if constexpr (sizeof(T) == 2)
    return exp_short(x);
  else
    return exp(x);
}

inline f64v exp(f64v x, double lowest = -708.04) {
  const f64v least = set1(lowest);
  const PowerOfTwo<f64v> power(x, least, 710.0);
  f64v r = fma(power.n, set1(-6.93145751953125e-1), power.t);
  r = fma(power.n, set1(-1.42860682030941723212e-6), r);
  // A quotient of polynomials in r^2 has fewer terms for 53 bits than a polynomial in r.
  f64v rr = r * r;
  f64v p = fma(fma(set1(1.26177193074810590878e-4), rr, set1(3.02994407707441961300e-2)), rr,
               set1(9.99999999999999999910e-1));
  f64v q = fma(fma(fma(set1(3.00198505138664455042e-6), rr, set1(2.52448340349684104192e-3)), rr,
                   set1(2.27265548208155028766e-1)),
               rr, set1(2.0));
  p = p * r;
  f64v e = p / (q - p);
  return select_lt(x, least, set1(0.0), fma(e, set1(4.0), set1(2.0)) * power.half);
}

// log of 0, of normal positive numbers, infinity and NaN, to 1 ulp: of the mantissa from sqrt(1/2) to sqrt(2),
// and the exponent times log 2, whose first summand has few enough bits for an exact product.
inline f32v log(f32v x) {
  const f32v one = set1(1.0f), inf = set1(std::numeric_limits<float>::infinity());
  f32v n = exponent(x);
  f32v m = mantissa(x);
  const f32v above = select_lt(set1(1.41421356f), m, one, set1(0.0f));
  n = n + above;
  const f32v r = fma(above * set1(-0.5f), m, m) - one, rr = r * r;
  f32v p = set1(7.0376836292e-2f);
  p = fma(p, r, set1(-1.1514610310e-1f));
  p = fma(p, r, set1(1.1676998740e-1f));
  p = fma(p, r, set1(-1.2420140846e-1f));
  p = fma(p, r, set1(1.4249322787e-1f));
  p = fma(p, r, set1(-1.6668057665e-1f));
  p = fma(p, r, set1(2.0000714765e-1f));
  p = fma(p, r, set1(-2.4999993993e-1f));
  p = fma(p, r, set1(3.3333331174e-1f));
  p = fma(n, set1(-2.12194440e-4f), p * r * rr);
  p = fma(rr, set1(-0.5f), p) + r;
  p = fma(n, set1(0.693359375f), p);
  // What the polynomial cannot know: -inf of 0, and infinity and NaN as they are.
  p = select_eq(x, set1(0.0f), set1(0.0f) - inf, p);
  return select_lt(x, inf, p, x);
}

inline f64v log(f64v x) {
  const f64v one = set1(1.0), inf = set1(std::numeric_limits<double>::infinity());
  f64v n = exponent(x);
  f64v m = mantissa(x);
  const f64v above = select_lt(set1(1.4142135623730951), m, one, set1(0.0));
  n = n + above;
  const f64v r = fma(above * set1(-0.5), m, m) - one, rr = r * r;
  f64v p = set1(1.01875663804580931796e-4);
  p = fma(p, r, set1(4.97494994976747001425e-1));
  p = fma(p, r, set1(4.70579119878881725854));
  p = fma(p, r, set1(1.44989225341610930846e1));
  p = fma(p, r, set1(1.79368678507819816313e1));
  p = fma(p, r, set1(7.70838733755885391666));
  f64v q = r + set1(1.12873587189167450590e1);
  q = fma(q, r, set1(4.52279145837532221105e1));
  q = fma(q, r, set1(8.29875266912776603211e1));
  q = fma(q, r, set1(7.11544750618563894466e1));
  q = fma(q, r, set1(2.31251620126765340583e1));
  f64v y = fma(n, set1(-2.121944400546905827679e-4), r * rr * (p / q));
  y = fma(rr, set1(-0.5), y) + r;
  y = fma(n, set1(0.693359375), y);
  y = select_eq(x, set1(0.0), set1(0.0) - inf, y);
  return select_lt(x, inf, y, x);
}

template <class V>
inline V sigmoid(V x) {
  using A = typename V::scalar;
  return set1(A(1)) / (set1(A(1)) + exp(set1(A(0)) - x));
}

// sigmoid(x) and 1 - sigmoid(x), the latter without cancellation. The former is 0 where exp(-x) overflows, and then the
// latter, by which it is multiplied where it is used, need only be finite.
template <class V>
inline void sigmoid_and_rest(V x, V* y, V* rest) {
  using A = typename V::scalar;
  V e = exp(set1(A(0)) - x);
  *y = set1(A(1)) / (set1(A(1)) + e);
  // Finite, so that 0 times it is 0.
  *rest = min(set1(std::numeric_limits<A>::max()), e) * *y;
}

inline f32v tanh(f32v x) {
  f32v a = abs(x), x2 = x * x;
  f32v p = set1(-5.70498872745e-3f);
  p = fma(p, x2, set1(2.06390887954e-2f));
  p = fma(p, x2, set1(-5.37397155531e-2f));
  p = fma(p, x2, set1(1.33314422036e-1f));
  p = fma(p, x2, set1(-3.33332819422e-1f));
  // Near 0 the exponential's 1 would swallow x's digits.
  f32v small = fma(p * x2, a, a);
  f32v large = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  return copysign(select_lt(a, set1(0.625f), small, large), x);  // -0 keeps its sign
}

inline f64v tanh(f64v x) {
  const f64v a = abs(x), xx = x * x;
  f64v p = set1(-9.64399179425052238628e-1);
  p = fma(p, xx, set1(-9.92877231001918586564e1));
  p = fma(p, xx, set1(-1.61468768441708447952e3));
  f64v q = xx + set1(1.12811678491632931402e2);
  q = fma(q, xx, set1(2.23548839060100448583e3));
  q = fma(q, xx, set1(4.84406305325125486048e3));
  const f64v small = fma(a * xx, p / q, a);
  const f64v large = set1(1.0) - set1(2.0) / (exp(a + a) + set1(1.0));
  return copysign(select_lt(a, set1(0.625), small, large), x);
}

// exp(-x^2 / 2), which both Phi and its derivative need.
template <class V>
inline V gaussian(V x) {
  using A = typename V::scalar;
  return exp(x * x * set1(A(-0.5)));
}

// The normal distribution function Phi(x) = erfc(-x / sqrt 2) / 2, given g = gaussian(x). In the lower tail it loses no
// more than g has lost: Phi(-a) = exp(-a^2 / 2) t P(t), t = 1 / (1 + 0.35 a), P fitted to 3e-8 on 0 <= a <= 14.5.
inline f32v normal_cdf(f32v x, f32v g) {
  f32v t = set1(1.0f) / fma(abs(x), set1(0.35f), set1(1.0f));
  f32v p = set1(-0.029157886281609535f);
  p = fma(p, t, set1(0.14403091371059418f));
  p = fma(p, t, set1(-0.2558389902114868f));
  p = fma(p, t, set1(0.1593196988105774f));
  p = fma(p, t, set1(-0.023212352767586708f));
  p = fma(p, t, set1(0.10555250197649002f));
  p = fma(p, t, set1(0.11982128769159317f));
  p = fma(p, t, set1(0.139863520860672f));
  p = fma(p, t, set1(0.139621302485466f));
  f32v lower = g * t * p;
  return select_lt(set1(0.0f), x, set1(1.0f) - lower, lower);
}

inline f64v normal_cdf(f64v x, f64v) {
  // gelu of doubles is rare: what libm has will do.
  double lane[f64v::size];
  store(lane, x);
  for (int i = 0; i < f64v::size; ++i) lane[i] = 0.5 * std::erfc(lane[i] * -0.70710678118654752440);
  return load(lane);
}

// Single elements, converted as a vector's are.
template <class T>
inline acc_t<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return *p;
  } else {
    // Through a vector, since conversions are instructions of the set and their rounding is to be the same.
    float lane[f32v::size];
    if constexpr (f32v::size == 1)
      store(lane, load(p));
    else
      store(lane, load_n(p, 1));
    return lane[0];
  }
}
template <class T>
inline void store_one(T* p, acc_t<T> x) {
  if constexpr (f32v::size == 1)
    store(p, set1(x));
  else
    store_n(p, set1(x), 1);
}
template <class A>
inline A exp_one(A x) {
  A lane[vec_t<A>::size];
  store(lane, exp(set1(x)));
  return lane[0];
}
