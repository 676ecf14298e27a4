// The SIMD vocabulary on AVX2 + FMA + F16C, included inside namespace rf::avx2 within its target region.
// max and min return the second argument when either is NaN; callers rely on it to let NaN through.

struct f32v {
  __m256 v;
  static constexpr int size = 8;
  using scalar = float;
};
struct f64v {
  __m256d v;
  static constexpr int size = 4;
  using scalar = double;
};

inline __m256i lanes8(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes4(int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline f32v set1(float x) { return {_mm256_set1_ps(x)}; }
inline f64v set1(double x) { return {_mm256_set1_pd(x)}; }

inline f32v widen(__m128i h, const bf16*) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline f32v widen(__m128i h, const f16*) { return {_mm256_cvtph_ps(h)}; }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
inline __m128i narrow(f32v x, const bf16*) {
  __m256i u = _mm256_castps_si256(x.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  __m256i bits = _mm256_blendv_epi8(rounded, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
inline __m128i narrow(f32v x, const f16*) { return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

// AVX2 has no masked access to 16-bit elements: a tail goes through a 16-byte local.
inline __m128i load_tail16(const void* p, int64_t n) {
  alignas(16) uint16_t lanes[8] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = ((const uint16_t*)p)[i];
  return _mm_load_si128((const __m128i*)lanes);
}
inline void store_tail16(void* p, __m128i h, int64_t n) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128((__m128i*)lanes, h);
  for (int64_t i = 0; i < n; ++i) ((uint16_t*)p)[i] = lanes[i];
}

inline f32v load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline f64v load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline f32v load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p), p); }
inline f32v load(const f16* p) { return widen(_mm_loadu_si128((const __m128i*)p), p); }

// The first n lanes from memory, 0 <= n < size; nothing beyond them is touched. The other lanes are zero.
inline f32v load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, lanes8(n))}; }
inline f64v load_n(const double* p, int64_t n) { return {_mm256_maskload_pd(p, lanes4(n))}; }
inline f32v load_n(const bf16* p, int64_t n) { return widen(load_tail16(p, n), p); }
inline f32v load_n(const f16* p, int64_t n) { return widen(load_tail16(p, n), p); }

// Lanes n and above replaced by those of fill.
inline f32v first_n(f32v x, int64_t n, f32v fill) {
  return {_mm256_blendv_ps(fill.v, x.v, _mm256_castsi256_ps(lanes8(n)))};
}
inline f64v first_n(f64v x, int64_t n, f64v fill) {
  return {_mm256_blendv_pd(fill.v, x.v, _mm256_castsi256_pd(lanes4(n)))};
}

inline void store(float* p, f32v x) { _mm256_storeu_ps(p, x.v); }
inline void store(double* p, f64v x) { _mm256_storeu_pd(p, x.v); }
inline void store(bf16* p, f32v x) { _mm_storeu_si128((__m128i*)p, narrow(x, p)); }
inline void store(f16* p, f32v x) { _mm_storeu_si128((__m128i*)p, narrow(x, p)); }
inline void store_n(float* p, f32v x, int64_t n) { _mm256_maskstore_ps(p, lanes8(n), x.v); }
inline void store_n(double* p, f64v x, int64_t n) { _mm256_maskstore_pd(p, lanes4(n), x.v); }
inline void store_n(bf16* p, f32v x, int64_t n) { store_tail16(p, narrow(x, p), n); }
inline void store_n(f16* p, f32v x, int64_t n) { store_tail16(p, narrow(x, p), n); }

// Non-temporal: p is aligned to the bytes written.
inline void stream(float* p, f32v x, f32v y) {
  _mm256_stream_ps(p, x.v);
  _mm256_stream_ps(p + 8, y.v);
}
inline void stream(double* p, f64v x, f64v y) {
  _mm256_stream_pd(p, x.v);
  _mm256_stream_pd(p + 4, y.v);
}
template <class T>
inline void stream(T* p, f32v x, f32v y) {
  _mm256_stream_si256((__m256i*)p, _mm256_set_m128i(narrow(y, p), narrow(x, p)));
}
inline void stream_fence() { _mm_sfence(); }

inline f32v operator+(f32v a, f32v b) { return {_mm256_add_ps(a.v, b.v)}; }
inline f64v operator+(f64v a, f64v b) { return {_mm256_add_pd(a.v, b.v)}; }
inline f32v operator-(f32v a, f32v b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline f64v operator-(f64v a, f64v b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline f32v operator*(f32v a, f32v b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline f64v operator*(f64v a, f64v b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline f32v operator/(f32v a, f32v b) { return {_mm256_div_ps(a.v, b.v)}; }
inline f64v operator/(f64v a, f64v b) { return {_mm256_div_pd(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline f64v fma(f64v a, f64v b, f64v c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline f32v max(f32v a, f32v b) { return {_mm256_max_ps(a.v, b.v)}; }
inline f64v max(f64v a, f64v b) { return {_mm256_max_pd(a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {_mm256_min_ps(a.v, b.v)}; }
inline f64v min(f64v a, f64v b) { return {_mm256_min_pd(a.v, b.v)}; }
inline f32v abs(f32v a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline f64v abs(f64v a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline f32v copysign(f32v magnitude, f32v sign) {
  return {_mm256_or_ps(abs(magnitude).v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
inline f64v copysign(f64v magnitude, f64v sign) {
  return {_mm256_or_pd(abs(magnitude).v, _mm256_and_pd(sign.v, _mm256_set1_pd(-0.0)))};
}
// a < b ? x : y, lane by lane; y where a or b is NaN. In the compiler's own words: of the intrinsics g++ asks once more
// whether the comparison's lanes are negative.
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) { return {a.v < b.v ? x.v : y.v}; }
inline f64v select_lt(f64v a, f64v b, f64v x, f64v y) { return {a.v < b.v ? x.v : y.v}; }
// a == b ? x : y, lane by lane; y where a or b is NaN.
inline f32v select_eq(f32v a, f32v b, f32v x, f32v y) { return {a.v == b.v ? x.v : y.v}; }
inline f64v select_eq(f64v a, f64v b, f64v x, f64v y) { return {a.v == b.v ? x.v : y.v}; }
inline f32v round_even(f32v a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline f64v round_even(f64v a) { return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The last bits of a number as the exponent of a power of two.
inline f32v last_bits_as_exponent(f32v x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
}
inline f64v last_bits_as_exponent(f64v x) {
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x.v), 52))};
}

// The n of 2^n <= x < 2^(n + 1), of normal positive numbers.
inline f32v exponent(f32v x) {
  __m256i biased = _mm256_srli_epi32(_mm256_castps_si256(x.v), 23);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)))};
}
inline f64v exponent(f64v x) {
  const __m256d whole = _mm256_set1_pd(0x1p52);  // whose last bits count
  const __m256i biased = _mm256_srli_epi64(_mm256_castpd_si256(x.v), 52);
  const __m256d counted = _mm256_castsi256_pd(_mm256_or_si256(biased, _mm256_castpd_si256(whole)));
  return {_mm256_sub_pd(counted, _mm256_set1_pd(0x1p52 + 1023))};
}

// x / 2^n, in [1, 2).
inline f32v mantissa(f32v x) {
  return {_mm256_or_ps(_mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffff))), _mm256_set1_ps(1.0f))};
}
inline f64v mantissa(f64v x) {
  const __m256i bits = _mm256_set1_epi64x(0xfffffffffffff);
  return {_mm256_or_pd(_mm256_and_pd(x.v, _mm256_castsi256_pd(bits)), _mm256_set1_pd(1.0))};
}

inline float reduce_add(f32v a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline double reduce_add(f64v a) {
  __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline float reduce_max(f32v a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline double reduce_max(f64v a) {
  __m128d s = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

// Every other element of a and b one behind the other, beginning with the first or the second; and the way back.
inline void unzip(f32v a, f32v b, f32v* even, f32v* odd) {
  const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
  const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
  *even = {_mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xd8))};
  *odd = {_mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xd8))};
}
inline void unzip(f64v a, f64v b, f64v* even, f64v* odd) {
  *even = {_mm256_permute4x64_pd(_mm256_unpacklo_pd(a.v, b.v), 0xd8)};
  *odd = {_mm256_permute4x64_pd(_mm256_unpackhi_pd(a.v, b.v), 0xd8)};
}
inline void zip(f32v even, f32v odd, f32v* a, f32v* b) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  *a = {_mm256_permute2f128_ps(low, high, 0x20)};
  *b = {_mm256_permute2f128_ps(low, high, 0x31)};
}
inline void zip(f64v even, f64v odd, f64v* a, f64v* b) {
  const __m256d low = _mm256_unpacklo_pd(even.v, odd.v), high = _mm256_unpackhi_pd(even.v, odd.v);
  *a = {_mm256_permute2f128_pd(low, high, 0x20)};
  *b = {_mm256_permute2f128_pd(low, high, 0x31)};
}

// Lane i of the result is the sum of v[i]'s lanes: pairs of vectors are folded into one, halves onto halves as in
// reduce_add, since a row's sum must not depend on whether it came in a group.
[[gnu::always_inline]] inline f32v reduce_each(const f32v (&v)[8]) {
  __m256 quarter[4], pair[2];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    quarter[k] = _mm256_add_ps(_mm256_permute2f128_ps(v[k].v, v[4 + k].v, 0x20),
                               _mm256_permute2f128_ps(v[k].v, v[4 + k].v, 0x31));
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m256d a = _mm256_castps_pd(quarter[2 * k]), b = _mm256_castps_pd(quarter[2 * k + 1]);
    pair[k] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return {_mm256_add_ps(_mm256_shuffle_ps(pair[0], pair[1], 0x88), _mm256_shuffle_ps(pair[0], pair[1], 0xdd))};
}

[[gnu::always_inline]] inline f64v reduce_each(const f64v (&v)[4]) {
  __m256d pair[2];
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k)
    pair[k] = _mm256_add_pd(_mm256_permute2f128_pd(v[k].v, v[2 + k].v, 0x20),
                            _mm256_permute2f128_pd(v[k].v, v[2 + k].v, 0x31));
  return {_mm256_add_pd(_mm256_unpacklo_pd(pair[0], pair[1]), _mm256_unpackhi_pd(pair[0], pair[1]))};
}

// 4 x 4: r[i][j] becomes r[j][i].
inline void transpose(f64v (&r)[4]) {
  const __m256d lo01 = _mm256_unpacklo_pd(r[0].v, r[1].v), hi01 = _mm256_unpackhi_pd(r[0].v, r[1].v);
  const __m256d lo23 = _mm256_unpacklo_pd(r[2].v, r[3].v), hi23 = _mm256_unpackhi_pd(r[2].v, r[3].v);
  r[0].v = _mm256_permute2f128_pd(lo01, lo23, 0x20);
  r[1].v = _mm256_permute2f128_pd(hi01, hi23, 0x20);
  r[2].v = _mm256_permute2f128_pd(lo01, lo23, 0x31);
  r[3].v = _mm256_permute2f128_pd(hi01, hi23, 0x31);
}
// 8 x 8, as above.
inline void transpose(f32v (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i].v = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1].v = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2].v = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3].v = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m256 lo = r[j].v, hi = r[4 + j].v;
    r[j].v = _mm256_permute2f128_ps(lo, hi, 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(lo, hi, 0x31);
  }
}
