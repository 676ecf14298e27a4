// The SIMD vocabulary on AVX-512 (F, BW, DQ, VL), included inside namespace rf::avx512 within its target region.
// max and min return the second argument when either is NaN; callers rely on it to let NaN through.

struct f32v {
  __m512 v;
  static constexpr int size = 16;
  using scalar = float;
};
struct f64v {
  __m512d v;
  static constexpr int size = 8;
  using scalar = double;
};

inline __mmask16 lanes16(int64_t n) { return (__mmask16)((1u << n) - 1); }
inline __mmask8 lanes8(int64_t n) { return (__mmask8)((1u << n) - 1); }

inline f32v set1(float x) { return {_mm512_set1_ps(x)}; }
inline f64v set1(double x) { return {_mm512_set1_pd(x)}; }

inline f32v widen(__m256i h, const bf16*) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline f32v widen(__m256i h, const f16*) { return {_mm512_cvtph_ps(h)}; }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
inline __m256i narrow(f32v x, const bf16*) {
  const __m512i u = _mm512_castps_si512(x.v);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}
inline __m256i narrow(f32v x, const f16*) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT); }

inline f32v load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f64v load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline f32v load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p), p); }
inline f32v load(const f16* p) { return widen(_mm256_loadu_si256((const __m256i*)p), p); }

// The first n lanes from memory, 0 <= n < size; nothing beyond them is touched. The other lanes are zero.
inline f32v load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes16(n), p)}; }
inline f64v load_n(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(lanes8(n), p)}; }
inline f32v load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes16(n), p), p); }
inline f32v load_n(const f16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes16(n), p), p); }

// Lanes n and above replaced by those of fill.
inline f32v first_n(f32v x, int64_t n, f32v fill) { return {_mm512_mask_mov_ps(fill.v, lanes16(n), x.v)}; }
inline f64v first_n(f64v x, int64_t n, f64v fill) { return {_mm512_mask_mov_pd(fill.v, lanes8(n), x.v)}; }

inline void store(float* p, f32v x) { _mm512_storeu_ps(p, x.v); }
inline void store(double* p, f64v x) { _mm512_storeu_pd(p, x.v); }
inline void store(bf16* p, f32v x) { _mm256_storeu_si256((__m256i*)p, narrow(x, p)); }
inline void store(f16* p, f32v x) { _mm256_storeu_si256((__m256i*)p, narrow(x, p)); }
inline void store_n(float* p, f32v x, int64_t n) { _mm512_mask_storeu_ps(p, lanes16(n), x.v); }
inline void store_n(double* p, f64v x, int64_t n) { _mm512_mask_storeu_pd(p, lanes8(n), x.v); }
inline void store_n(bf16* p, f32v x, int64_t n) { _mm256_mask_storeu_epi16(p, lanes16(n), narrow(x, p)); }
inline void store_n(f16* p, f32v x, int64_t n) { _mm256_mask_storeu_epi16(p, lanes16(n), narrow(x, p)); }

// Non-temporal: p is aligned to the bytes written.
inline void stream(float* p, f32v x, f32v y) {
  _mm512_stream_ps(p, x.v);
  _mm512_stream_ps(p + 16, y.v);
}
inline void stream(double* p, f64v x, f64v y) {
  _mm512_stream_pd(p, x.v);
  _mm512_stream_pd(p + 8, y.v);
}
template <class T>
inline void stream(T* p, f32v x, f32v y) {
  const __m512i first = _mm512_castsi256_si512(narrow(x, p));
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(first, narrow(y, p), 1));
}
inline void stream_fence() { _mm_sfence(); }

inline f32v operator+(f32v a, f32v b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f64v operator+(f64v a, f64v b) { return {_mm512_add_pd(a.v, b.v)}; }
inline f32v operator-(f32v a, f32v b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f64v operator-(f64v a, f64v b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline f32v operator*(f32v a, f32v b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f64v operator*(f64v a, f64v b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline f32v operator/(f32v a, f32v b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f64v operator/(f64v a, f64v b) { return {_mm512_div_pd(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f64v fma(f64v a, f64v b, f64v c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline f32v max(f32v a, f32v b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f64v max(f64v a, f64v b) { return {_mm512_max_pd(a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f64v min(f64v a, f64v b) { return {_mm512_min_pd(a.v, b.v)}; }
inline f32v abs(f32v a) { return {_mm512_abs_ps(a.v)}; }
inline f64v abs(f64v a) { return {_mm512_abs_pd(a.v)}; }
inline f32v copysign(f32v magnitude, f32v sign) {
  __m512i s = _mm512_and_si512(_mm512_castps_si512(sign.v), _mm512_set1_epi32((int)0x80000000u));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(_mm512_abs_ps(magnitude.v)), s))};
}
inline f64v copysign(f64v magnitude, f64v sign) {
  const __m512d mask = _mm512_set1_pd(-0.0);
  return {_mm512_or_pd(_mm512_andnot_pd(mask, magnitude.v), _mm512_and_pd(mask, sign.v))};
}
// a < b ? x : y, lane by lane; y where a or b is NaN.
inline f32v select_lt(f32v a, f32v b, f32v x, f32v y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
inline f64v select_lt(f64v a, f64v b, f64v x, f64v y) {
  return {_mm512_mask_mov_pd(y.v, _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
// a == b ? x : y, lane by lane; y where a or b is NaN.
inline f32v select_eq(f32v a, f32v b, f32v x, f32v y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), x.v)};
}
inline f64v select_eq(f64v a, f64v b, f64v x, f64v y) {
  return {_mm512_mask_mov_pd(y.v, _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ), x.v)};
}
inline f32v round_even(f32v a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline f64v round_even(f64v a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The last bits of a number as the exponent of a power of two.
inline f32v last_bits_as_exponent(f32v x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
}
inline f64v last_bits_as_exponent(f64v x) {
  return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x.v), 52))};
}

// The n of 2^n <= x < 2^(n + 1), of normal positive numbers.
inline f32v exponent(f32v x) { return {_mm512_getexp_ps(x.v)}; }
inline f64v exponent(f64v x) { return {_mm512_getexp_pd(x.v)}; }

// x / 2^n, in [1, 2).
inline f32v mantissa(f32v x) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffff));
  return {_mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_castps_si512(_mm512_set1_ps(1.0f))))};
}
inline f64v mantissa(f64v x) {
  const __m512i bits = _mm512_and_si512(_mm512_castpd_si512(x.v), _mm512_set1_epi64(0xfffffffffffff));
  return {_mm512_castsi512_pd(_mm512_or_si512(bits, _mm512_castpd_si512(_mm512_set1_pd(1.0))))};
}

inline float reduce_add(f32v a) { return _mm512_reduce_add_ps(a.v); }
inline double reduce_add(f64v a) { return _mm512_reduce_add_pd(a.v); }
inline float reduce_max(f32v a) { return _mm512_reduce_max_ps(a.v); }
inline double reduce_max(f64v a) { return _mm512_reduce_max_pd(a.v); }

// Every other element of a and b one behind the other, beginning with the first or the second; and the way back.
inline void unzip(f32v a, f32v b, f32v* even, f32v* odd) {
  const __m512i e = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  *even = {_mm512_permutex2var_ps(a.v, e, b.v)};
  *odd = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(e, _mm512_set1_epi32(1)), b.v)};
}
inline void unzip(f64v a, f64v b, f64v* even, f64v* odd) {
  const __m512i e = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
  *even = {_mm512_permutex2var_pd(a.v, e, b.v)};
  *odd = {_mm512_permutex2var_pd(a.v, _mm512_add_epi64(e, _mm512_set1_epi64(1)), b.v)};
}
inline void zip(f32v even, f32v odd, f32v* a, f32v* b) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  *a = {_mm512_permutex2var_ps(even.v, low, odd.v)};
  *b = {_mm512_permutex2var_ps(even.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd.v)};
}
inline void zip(f64v even, f64v odd, f64v* a, f64v* b) {
  const __m512i low = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  *a = {_mm512_permutex2var_pd(even.v, low, odd.v)};
  *b = {_mm512_permutex2var_pd(even.v, _mm512_add_epi64(low, _mm512_set1_epi64(4)), odd.v)};
}

// Lane i of the result is the sum of v[i]'s lanes: pairs of vectors are folded into one, halves onto halves as in
// reduce_add, since a row's sum must not depend on whether it came in a group.
[[gnu::always_inline]] inline f32v reduce_each(const f32v (&v)[16]) {
  __m512 half[8], quarter[4], pair[2];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const __m512 a = v[k % 4 + k / 4 * 8].v, b = v[k % 4 + k / 4 * 8 + 4].v;
    half[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    quarter[k] = _mm512_add_ps(_mm512_shuffle_f32x4(half[k], half[4 + k], 0x88),
                               _mm512_shuffle_f32x4(half[k], half[4 + k], 0xdd));
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m512d a = _mm512_castps_pd(quarter[2 * k]), b = _mm512_castps_pd(quarter[2 * k + 1]);
    pair[k] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd))};
}

[[gnu::always_inline]] inline f64v reduce_each(const f64v (&v)[8]) {
  __m512d half[4], pair[2];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // of v[0] and v[2], v[4] and v[6], v[1] and v[3], v[5] and v[7]
    const __m512d a = v[k % 2 * 4 + k / 2].v, b = v[k % 2 * 4 + k / 2 + 2].v;
    half[k] = _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k)
    pair[k] = _mm512_add_pd(_mm512_shuffle_f64x2(half[2 * k], half[2 * k + 1], 0x88),
                            _mm512_shuffle_f64x2(half[2 * k], half[2 * k + 1], 0xdd));
  return {_mm512_add_pd(_mm512_unpacklo_pd(pair[0], pair[1]), _mm512_unpackhi_pd(pair[0], pair[1]))};
}

// 16 x 16: r[i][j] becomes r[j][i].
inline void transpose(f32v (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d lo0 = _mm512_castps_pd(t[4 * i]), hi0 = _mm512_castps_pd(t[4 * i + 1]);
    __m512d lo1 = _mm512_castps_pd(t[4 * i + 2]), hi1 = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
    r[4 * i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
    r[4 * i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
    r[4 * i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
  }
  // r[4i + j] now holds column 4q + j of rows 4i .. 4i+3 in its 128-bit quarter q: exchange quarters.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512 a = _mm512_shuffle_f32x4(r[j].v, r[4 + j].v, 0x88), b = _mm512_shuffle_f32x4(r[8 + j].v, r[12 + j].v, 0x88);
    __m512 c = _mm512_shuffle_f32x4(r[j].v, r[4 + j].v, 0xdd), d = _mm512_shuffle_f32x4(r[8 + j].v, r[12 + j].v, 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i].v = t[i];
}

// 8 x 8, as above.
inline void transpose(f64v (&r)[8]) {
  __m512d t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm512_unpacklo_pd(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i].v, r[2 * i + 1].v);
  }
  // t[2i + j] holds column 2q + j of rows 2i and 2i + 1 in its quarter q: exchange quarters.
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    __m512d a = _mm512_shuffle_f64x2(t[j], t[2 + j], 0x88), b = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0x88);
    __m512d c = _mm512_shuffle_f64x2(t[j], t[2 + j], 0xdd), d = _mm512_shuffle_f64x2(t[4 + j], t[6 + j], 0xdd);
    r[j].v = _mm512_shuffle_f64x2(a, b, 0x88);
    r[4 + j].v = _mm512_shuffle_f64x2(a, b, 0xdd);
    r[2 + j].v = _mm512_shuffle_f64x2(c, d, 0x88);
    r[6 + j].v = _mm512_shuffle_f64x2(c, d, 0xdd);
  }
}

// The first n of up to 8 lanes from `low` and as many from `high`, one behind the other; the other lanes are zero.
// Whole ones are loaded without a mask: masked loads from memory took twice as long (Zen 5).
inline __m256 load_half(const float* p, int64_t n) {
  return n == 8 ? _mm256_loadu_ps(p) : _mm512_castps512_ps256(load_n(p, n).v);
}
template <class T>
inline __m128i load_half(const T* p, int64_t n) {
  return n == 8 ? _mm_loadu_si128((const __m128i*)p) : _mm256_castsi256_si128(_mm256_maskz_loadu_epi16(lanes16(n), p));
}
inline f32v load_pair(const float* low, int64_t low_n, const float* high, int64_t high_n) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(load_half(low, low_n)), load_half(high, high_n), 1)};
}
template <class T>
inline f32v load_pair(const T* low, int64_t low_n, const T* high, int64_t high_n) {
  return widen(_mm256_inserti128_si256(_mm256_castsi128_si256(load_half(low, low_n)), load_half(high, high_n), 1), low);
}
// Two squares of 8 x 8 side by side, each as above.
[[gnu::always_inline]] inline void transpose(f32v (&r)[8]) {
  __m512 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i].v = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1].v = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2].v = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3].v = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  const __m512i even = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0), odd = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512d low = _mm512_castps_pd(r[j].v), high = _mm512_castps_pd(r[4 + j].v);
    r[j].v = _mm512_castpd_ps(_mm512_permutex2var_pd(low, even, high));
    r[4 + j].v = _mm512_castpd_ps(_mm512_permutex2var_pd(low, odd, high));
  }
}

// ---- pairs of bf16 (AVX512-BF16) -----------------------------------------------------------------------------------

struct bf16x2v {
  __m512i v;
  static constexpr int size = 16;
  using scalar = bf16x2;
};
inline bf16x2v set1(bf16x2 x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {_mm512_set1_epi32(bits)};
}
inline bf16x2v load(const bf16x2* p) { return {_mm512_loadu_si512(p)}; }
inline void store(bf16x2* p, bf16x2v x) { _mm512_storeu_si512(p, x.v); }
inline void store_n(bf16x2* p, bf16x2v x, int64_t n) { _mm512_mask_storeu_ps(p, lanes16(n), _mm512_castsi512_ps(x.v)); }
inline f32v as_floats(bf16x2v x) { return {_mm512_castsi512_ps(x.v)}; }
inline bf16x2v as_pairs(f32v x) { return {_mm512_castps_si512(x.v)}; }

// c plus both products of a pair, each addition rounded.
inline f32v fma(bf16x2v a, bf16x2v b, f32v c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }

// Rounded to nearest even; subnormal numbers to zero.
inline bf16x2v narrow_pairs(f32v low, f32v high) { return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)}; }

// Numbers that follow one another, two to a lane; n of them, 0 <= n < 32, and zeros.
inline bf16x2v load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
inline bf16x2v load_pairs(const float* p) { return narrow_pairs(load(p), load(p + 16)); }
inline bf16x2v load_pairs_n(const bf16* p, int64_t n) {
  return {_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p)};
}
inline bf16x2v load_pairs_n(const float* p, int64_t n) {
  return n >= 16 ? narrow_pairs(load(p), load_n(p + 16, n - 16)) : narrow_pairs(load_n(p, n), set1(0.0f));
}
// n numbers of each of two rows side by side, 0 < n <= 16; a row that is null is zero.
inline __m512i load_16(const bf16* p, int64_t n) {
  if (!p) return _mm512_setzero_si512();
  return _mm512_cvtepu16_epi32(n == 16 ? _mm256_loadu_si256((const __m256i*)p)
                                       : _mm256_maskz_loadu_epi16(lanes16(n), p));
}
inline bf16x2v interleave(const bf16* first, const bf16* second, int64_t n) {
  return {_mm512_or_si512(load_16(first, n), _mm512_slli_epi32(load_16(second, n), 16))};
}
inline bf16x2v interleave(const float* first, const float* second, int64_t n) {
  const f32v a = load_n(first, n), b = second ? load_n(second, n) : set1(0.0f);
  const __m512i step = _mm512_set1_epi32(0x00100000);  // lane i takes numbers i and 16 + i
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i order = _mm512_add_epi32(step, _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)));
  return {_mm512_permutexvar_epi16(order, narrow_pairs(a, b).v)};
}

// The C of products of pairs: rounded by one instruction instead of eight, which takes subnormal results for zero.
struct flushed_bf16 : bf16 {};
inline f32v load(const flushed_bf16* p) { return load((const bf16*)p); }
inline f32v load_n(const flushed_bf16* p, int64_t n) { return load_n((const bf16*)p, n); }
inline void store(flushed_bf16* p, f32v x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v)); }
inline void store_n(flushed_bf16* p, f32v x, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes16(n), (__m256i)_mm512_cvtneps_pbh(x.v));
}
inline void store_all(flushed_bf16* p, const f32v (&x)[2]) { _mm512_storeu_si512(p, narrow_pairs(x[0], x[1]).v); }
