// The SIMD vocabulary on AArch64 Advanced SIMD, included inside namespace rf::neon. All of it is in base ARMv8.
// max and min return the second argument when either is NaN; callers rely on it to let NaN through.

struct f32v {
  float32x4_t v;
  static constexpr int size = 4;
  using scalar = float;
};
struct f64v {
  float64x2_t v;
  static constexpr int size = 2;
  using scalar = double;
};

inline f32v set1(float x) { return {vdupq_n_f32(x)}; }
inline f64v set1(double x) { return {vdupq_n_f64(x)}; }

inline f32v widen(uint16x4_t h, const bf16*) { return {vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(h), 16))}; }
inline f32v widen(uint16x4_t h, const f16*) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
inline uint16x4_t narrow(f32v x, const bf16*) {
  uint32x4_t u = vreinterpretq_u32_f32(x.v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet), 16);
}
inline uint16x4_t narrow(f32v x, const f16*) { return vreinterpret_u16_f16(vcvt_f16_f32(x.v)); }

// There is no masked access: a tail goes through a local of a vector's size.
template <class E, int size>
struct TailLanes {
  E lane[size] = {};
  TailLanes() = default;
  TailLanes(const void* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) lane[i] = ((const E*)p)[i];
  }
  void to(void* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) ((E*)p)[i] = lane[i];
  }
};
inline uint16x4_t load_tail16(const void* p, int64_t n) { return vld1_u16(TailLanes<uint16_t, 4>(p, n).lane); }
inline void store_tail16(void* p, uint16x4_t h, int64_t n) {
  TailLanes<uint16_t, 4> tail;
  vst1_u16(tail.lane, h);
  tail.to(p, n);
}

inline f32v load(const float* p) { return {vld1q_f32(p)}; }
inline f64v load(const double* p) { return {vld1q_f64(p)}; }
inline f32v load(const bf16* p) { return widen(vld1_u16((const uint16_t*)p), p); }
inline f32v load(const f16* p) { return widen(vld1_u16((const uint16_t*)p), p); }

// The first n lanes from memory, 0 <= n < size; nothing beyond them is touched. The other lanes are zero.
inline f32v load_n(const float* p, int64_t n) { return {vld1q_f32(TailLanes<float, 4>(p, n).lane)}; }
inline f64v load_n(const double* p, int64_t n) { return {vld1q_f64(TailLanes<double, 2>(p, n).lane)}; }
inline f32v load_n(const bf16* p, int64_t n) { return widen(load_tail16(p, n), p); }
inline f32v load_n(const f16* p, int64_t n) { return widen(load_tail16(p, n), p); }

// Lanes n and above replaced by those of fill.
inline f32v first_n(f32v x, int64_t n, f32v fill) {
  const uint32x4_t index = {0, 1, 2, 3};
  return {vbslq_f32(vcltq_u32(index, vdupq_n_u32((uint32_t)n)), x.v, fill.v)};
}
inline f64v first_n(f64v x, int64_t n, f64v fill) {
  const uint64x2_t index = {0, 1};
  return {vbslq_f64(vcltq_u64(index, vdupq_n_u64((uint64_t)n)), x.v, fill.v)};
}

inline void store(float* p, f32v x) { vst1q_f32(p, x.v); }
inline void store(double* p, f64v x) { vst1q_f64(p, x.v); }
inline void store(bf16* p, f32v x) { vst1_u16((uint16_t*)p, narrow(x, p)); }
inline void store(f16* p, f32v x) { vst1_u16((uint16_t*)p, narrow(x, p)); }
inline void store_n(float* p, f32v x, int64_t n) {
  TailLanes<float, 4> tail;
  vst1q_f32(tail.lane, x.v);
  tail.to(p, n);
}
inline void store_n(double* p, f64v x, int64_t n) {
  TailLanes<double, 2> tail;
  vst1q_f64(tail.lane, x.v);
  tail.to(p, n);
}
inline void store_n(bf16* p, f32v x, int64_t n) { store_tail16(p, narrow(x, p), n); }
inline void store_n(f16* p, f32v x, int64_t n) { store_tail16(p, narrow(x, p), n); }

// No intrinsic writes past the caches here: a plain store.
template <class T, class V>
inline void stream(T* p, V x, V y) {
  store(p, x);
  store(p + V::size, y);
}
inline void stream_fence() {}

inline f32v operator+(f32v a, f32v b) { return {vaddq_f32(a.v, b.v)}; }
inline f64v operator+(f64v a, f64v b) { return {vaddq_f64(a.v, b.v)}; }
inline f32v operator-(f32v a, f32v b) { return {vsubq_f32(a.v, b.v)}; }
inline f64v operator-(f64v a, f64v b) { return {vsubq_f64(a.v, b.v)}; }
inline f32v operator*(f32v a, f32v b) { return {vmulq_f32(a.v, b.v)}; }
inline f64v operator*(f64v a, f64v b) { return {vmulq_f64(a.v, b.v)}; }
inline f32v operator/(f32v a, f32v b) { return {vdivq_f32(a.v, b.v)}; }
inline f64v operator/(f64v a, f64v b) { return {vdivq_f64(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline f64v fma(f64v a, f64v b, f64v c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
// By comparison: the instructions FMAX and FMIN return a NaN from either side.
inline f32v max(f32v a, f32v b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline f64v max(f64v a, f64v b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline f64v min(f64v a, f64v b) { return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)}; }
inline f32v abs(f32v a) { return {vabsq_f32(a.v)}; }
inline f64v abs(f64v a) { return {vabsq_f64(a.v)}; }
inline f64v copysign(f64v magnitude, f64v sign) {
  return {vbslq_f64(vdupq_n_u64(0x8000000000000000u), sign.v, magnitude.v)};
}
inline f32v copysign(f32v magnitude, f32v sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v)}; }
// a < b ? x : y, lane by lane; y where a or b is NaN.
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
inline f64v select_lt(f64v a, f64v b, f64v x, f64v y) { return {vbslq_f64(vcltq_f64(a.v, b.v), x.v, y.v)}; }
// a == b ? x : y, lane by lane; y where a or b is NaN.
inline f32v select_eq(f32v a, f32v b, f32v x, f32v y) { return {vbslq_f32(vceqq_f32(a.v, b.v), x.v, y.v)}; }
inline f64v select_eq(f64v a, f64v b, f64v x, f64v y) { return {vbslq_f64(vceqq_f64(a.v, b.v), x.v, y.v)}; }
inline f32v round_even(f32v a) { return {vrndnq_f32(a.v)}; }
inline f64v round_even(f64v a) { return {vrndnq_f64(a.v)}; }
// The last bits of a number as the exponent of a power of two.
inline f32v last_bits_as_exponent(f32v x) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(x.v), 23))};
}
inline f64v last_bits_as_exponent(f64v x) {
  return {vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(x.v), 52))};
}
// The n of 2^n <= x < 2^(n + 1), of normal positive numbers.
inline f32v exponent(f32v x) {
  int32x4_t biased = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_f32(x.v), 23));
  return {vcvtq_f32_s32(vsubq_s32(biased, vdupq_n_s32(127)))};
}
inline f64v exponent(f64v x) {
  int64x2_t biased = vreinterpretq_s64_u64(vshrq_n_u64(vreinterpretq_u64_f64(x.v), 52));
  return {vcvtq_f64_s64(vsubq_s64(biased, vdupq_n_s64(1023)))};
}

// Every other element of a and b one behind the other, beginning with the first or the second; and the way back.
inline void unzip(f32v a, f32v b, f32v* even, f32v* odd) {
  *even = {vuzp1q_f32(a.v, b.v)};
  *odd = {vuzp2q_f32(a.v, b.v)};
}
inline void unzip(f64v a, f64v b, f64v* even, f64v* odd) {
  *even = {vuzp1q_f64(a.v, b.v)};
  *odd = {vuzp2q_f64(a.v, b.v)};
}
inline void zip(f32v even, f32v odd, f32v* a, f32v* b) {
  *a = {vzip1q_f32(even.v, odd.v)};
  *b = {vzip2q_f32(even.v, odd.v)};
}
inline void zip(f64v even, f64v odd, f64v* a, f64v* b) {
  *a = {vzip1q_f64(even.v, odd.v)};
  *b = {vzip2q_f64(even.v, odd.v)};
}

// Halves on halves, as in the other ISAs (vaddvq adds neighbours): sums of transposed vectors must have the same bits.
// x / 2^n, in [1, 2).
inline f32v mantissa(f32v x) { return {vbslq_f32(vdupq_n_u32(0x7fffff), x.v, vdupq_n_f32(1.0f))}; }
inline f64v mantissa(f64v x) { return {vbslq_f64(vdupq_n_u64(0xfffffffffffff), x.v, vdupq_n_f64(1.0))}; }

inline float reduce_add(f32v a) { return vaddv_f32(vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v))); }
inline double reduce_add(f64v a) { return vaddvq_f64(a.v); }
inline float reduce_max(f32v a) { return vmaxvq_f32(a.v); }
inline double reduce_max(f64v a) { return vmaxvq_f64(a.v); }

// Lane i of the result is the sum of v[i]'s lanes, in the same order: pairs of vectors are folded into one.
[[gnu::always_inline]] inline f32v reduce_each(const f32v (&v)[4]) {
  float32x4_t a = vcombine_f32(vadd_f32(vget_low_f32(v[0].v), vget_high_f32(v[0].v)),
                               vadd_f32(vget_low_f32(v[1].v), vget_high_f32(v[1].v)));
  float32x4_t b = vcombine_f32(vadd_f32(vget_low_f32(v[2].v), vget_high_f32(v[2].v)),
                               vadd_f32(vget_low_f32(v[3].v), vget_high_f32(v[3].v)));
  return {vpaddq_f32(a, b)};
}

[[gnu::always_inline]] inline f64v reduce_each(const f64v (&v)[2]) { return {vpaddq_f64(v[0].v, v[1].v)}; }

// 2 x 2: r[i][j] becomes r[j][i].
inline void transpose(f64v (&r)[2]) {
  const float64x2_t low = vtrn1q_f64(r[0].v, r[1].v);
  r[1].v = vtrn2q_f64(r[0].v, r[1].v);
  r[0].v = low;
}
// 4 x 4, as above.
inline void transpose(f32v (&r)[4]) {
  float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(r[0].v, r[1].v));
  float64x2_t odd01 = vreinterpretq_f64_f32(vtrn2q_f32(r[0].v, r[1].v));
  float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(r[2].v, r[3].v));
  float64x2_t odd23 = vreinterpretq_f64_f32(vtrn2q_f32(r[2].v, r[3].v));
  r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(even01, even23));
  r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23));
  r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(even01, even23));
  r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23));
}
