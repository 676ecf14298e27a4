// The SIMD vocabulary with one lane, in plain C++, included inside namespace rf::scalar: the fallback everywhere, and
// the easiest place to read what each word means. max and min return the second argument when either is NaN.

struct f32v {
  float v;
  static constexpr int size = 1;
  using scalar = float;
};
struct f64v {
  double v;
  static constexpr int size = 1;
  using scalar = double;
};

inline f32v set1(float x) { return {x}; }
inline f64v set1(double x) { return {x}; }

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint64_t bits_of(double x) {
  uint64_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}
inline double float_of(uint64_t u) {
  double x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

inline f32v load(const float* p) { return {*p}; }
inline f64v load(const double* p) { return {*p}; }
inline f32v load(const bf16* p) { return {float_of((uint32_t)p->bits << 16)}; }
inline f32v load(const f16* p) {
  uint32_t h = p->bits, sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return {float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13)};
  if (magnitude < 0x400u) return {std::copysign((float)magnitude * 5.9604644775390625e-8f, float_of(sign))};  // * 2^-24
  return {float_of(sign | ((magnitude << 13) + (112u << 23)))};
}

// A vector of one lane has no tails: n is always zero in what follows.
inline f32v load_n(const float*, int64_t) { return {0.0f}; }
inline f64v load_n(const double*, int64_t) { return {0.0}; }
inline f32v load_n(const bf16*, int64_t) { return {0.0f}; }
inline f32v load_n(const f16*, int64_t) { return {0.0f}; }
inline f32v first_n(f32v, int64_t, f32v fill) { return fill; }
inline f64v first_n(f64v, int64_t, f64v fill) { return fill; }
template <class T, class V>
inline void store_n(T*, V, int64_t) {}

inline void store(float* p, f32v x) { *p = x.v; }
inline void store(double* p, f64v x) { *p = x.v; }
// Round to nearest even; a NaN keeps its sign and becomes quiet.
inline void store(bf16* p, f32v x) {
  uint32_t u = bits_of(x.v);
  p->bits = (uint16_t)(x.v != x.v ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void store(f16* p, f32v x) {
  uint32_t u = bits_of(x.v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    p->bits = (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    p->bits = (uint16_t)(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits at the bottom, rounded
    p->bits = (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    p->bits = (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
}
template <class T, class V>
inline void stream(T* p, V x, V y) {
  store(p, x);
  store(p + V::size, y);
}
inline void stream_fence() {}

inline f32v operator+(f32v a, f32v b) { return {a.v + b.v}; }
inline f64v operator+(f64v a, f64v b) { return {a.v + b.v}; }
inline f32v operator-(f32v a, f32v b) { return {a.v - b.v}; }
inline f64v operator-(f64v a, f64v b) { return {a.v - b.v}; }
inline f32v operator*(f32v a, f32v b) { return {a.v * b.v}; }
inline f64v operator*(f64v a, f64v b) { return {a.v * b.v}; }
inline f32v operator/(f32v a, f32v b) { return {a.v / b.v}; }
inline f64v operator/(f64v a, f64v b) { return {a.v / b.v}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {a.v * b.v + c.v}; }
inline f64v fma(f64v a, f64v b, f64v c) { return {a.v * b.v + c.v}; }
inline f32v max(f32v a, f32v b) { return {a.v > b.v ? a.v : b.v}; }
inline f64v max(f64v a, f64v b) { return {a.v > b.v ? a.v : b.v}; }
inline f32v min(f32v a, f32v b) { return {a.v < b.v ? a.v : b.v}; }
inline f64v min(f64v a, f64v b) { return {a.v < b.v ? a.v : b.v}; }
inline f32v abs(f32v a) { return {std::fabs(a.v)}; }
inline f64v abs(f64v a) { return {std::fabs(a.v)}; }
inline f64v copysign(f64v magnitude, f64v sign) { return {std::copysign(magnitude.v, sign.v)}; }
inline f32v copysign(f32v magnitude, f32v sign) { return {std::copysign(magnitude.v, sign.v)}; }
// a < b ? x : y; y where a or b is NaN.
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) { return a.v < b.v ? x : y; }
inline f64v select_lt(f64v a, f64v b, f64v x, f64v y) { return a.v < b.v ? x : y; }
// a == b ? x : y; y where a or b is NaN.
inline f32v select_eq(f32v a, f32v b, f32v x, f32v y) { return a.v == b.v ? x : y; }
inline f64v select_eq(f64v a, f64v b, f64v x, f64v y) { return a.v == b.v ? x : y; }
inline f32v round_even(f32v a) { return {std::nearbyintf(a.v)}; }
inline f64v round_even(f64v a) { return {std::nearbyint(a.v)}; }
// The last bits of a number as the exponent of a power of two.
inline f32v last_bits_as_exponent(f32v x) { return {float_of(bits_of(x.v) << 23)}; }
inline f64v last_bits_as_exponent(f64v x) { return {float_of(bits_of(x.v) << 52)}; }

// The n of 2^n <= x < 2^(n + 1), of normal positive numbers.
inline f32v exponent(f32v x) { return {(float)((int)(bits_of(x.v) >> 23) - 127)}; }
inline f64v exponent(f64v x) { return {(double)((int)(bits_of(x.v) >> 52) - 1023)}; }
// x / 2^n, in [1, 2).
inline f32v mantissa(f32v x) { return {float_of((bits_of(x.v) & 0x7fffffu) | bits_of(1.0f))}; }
inline f64v mantissa(f64v x) { return {float_of((bits_of(x.v) & 0xfffffffffffffu) | bits_of(1.0))}; }

inline float reduce_add(f32v a) { return a.v; }
inline double reduce_add(f64v a) { return a.v; }
inline float reduce_max(f32v a) { return a.v; }
inline double reduce_max(f64v a) { return a.v; }
// With one lane, two vectors are the even element and the odd one.
template <class V>
inline void unzip(V a, V b, V* even, V* odd) {
  *even = a;
  *odd = b;
}
template <class V>
inline void zip(V even, V odd, V* a, V* b) {
  *a = even;
  *b = odd;
}
inline f32v reduce_each(const f32v (&v)[1]) { return v[0]; }
inline f64v reduce_each(const f64v (&v)[1]) { return v[0]; }
inline void transpose(f32v (&)[1]) {}
inline void transpose(f64v (&)[1]) {}
