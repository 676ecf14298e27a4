// Stands in for the compiler's <immintrin.h> when isa_avx512.cpp is compiled for a CPU without AVX-512: SIMDe's
// portable versions under the intrinsics' own names, and below, lane by lane, those that its version 0.7.4 lacks or
// gets wrong.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#pragma GCC diagnostic pop

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef uint8_t __mmask8;
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

namespace lane_by_lane {

// A register as an array, and back.
template <class E, int n>
struct Lanes {
  E lane[n];
  Lanes() : lane() {}
  template <class V>
  explicit Lanes(const V& v) {
    static_assert(sizeof(V) == sizeof(lane), "as many lanes as the register has");
    std::memcpy(lane, &v, sizeof lane);
  }
  template <class V>
  V as() const {
    static_assert(sizeof(V) == sizeof(lane), "as many lanes as the register has");
    V v;
    std::memcpy(&v, lane, sizeof lane);
    return v;
  }
};

template <class V, class E, int n>
V load(unsigned mask, const void* p) {
  Lanes<E, n> r;
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) std::memcpy(&r.lane[i], (const E*)p + i, sizeof(E));
  return r.template as<V>();
}
template <class E, int n, class V>
void store(void* p, unsigned mask, V v) {
  const Lanes<E, n> r(v);
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) std::memcpy((E*)p + i, &r.lane[i], sizeof(E));
}
// In the compiler's order, halves on halves: the kernels count on it (see gemm_small.inl.h).
template <class E, int n, class V>
E sum(V v) {
  Lanes<E, n> r(v);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) r.lane[i] += r.lane[i + half];
  return r.lane[0];
}
template <class E, int n, class V>
E maximum(V v) {
  const Lanes<E, n> r(v);
  E m = r.lane[0];
  for (E x : r.lane) m = x > m ? x : m;
  return m;
}
template <class E, int n, class V>
V exponent(V v) {
  Lanes<E, n> r(v);
  for (E& x : r.lane) x = std::logb(x);
  return r.template as<V>();
}

}  // namespace lane_by_lane

inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* p) { return lane_by_lane::load<__m512, float, 16>(k, p); }
inline __m512 _mm512_getexp_ps(__m512 x) { return lane_by_lane::exponent<float, 16>(x); }
inline __m512d _mm512_getexp_pd(__m512d x) { return lane_by_lane::exponent<double, 8>(x); }
inline __m512d _mm512_maskz_loadu_pd(__mmask8 k, const void* p) { return lane_by_lane::load<__m512d, double, 8>(k, p); }
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 k, const void* p) {
  return lane_by_lane::load<__m256i, uint16_t, 16>(k, p);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void* p) {
  return lane_by_lane::load<__m512i, uint16_t, 32>(k, p);
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 v) { lane_by_lane::store<float, 16>(p, k, v); }
inline void _mm512_mask_storeu_pd(void* p, __mmask8 k, __m512d v) { lane_by_lane::store<double, 8>(p, k, v); }
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i v) { lane_by_lane::store<uint16_t, 16>(p, k, v); }

inline float _mm512_reduce_add_ps(__m512 v) { return lane_by_lane::sum<float, 16>(v); }
inline double _mm512_reduce_add_pd(__m512d v) { return lane_by_lane::sum<double, 8>(v); }
inline float _mm512_reduce_max_ps(__m512 v) { return lane_by_lane::maximum<float, 16>(v); }
inline double _mm512_reduce_max_pd(__m512d v) { return lane_by_lane::maximum<double, 8>(v); }

// A non-temporal store faults on an address that is not aligned: so does this.
inline void _mm512_stream_ps(void* p, __m512 v) {
  if ((uintptr_t)p % 64) __builtin_trap();
  std::memcpy(p, &v, 64);
}
inline void _mm512_stream_pd(void* p, __m512d v) {
  if ((uintptr_t)p % 64) __builtin_trap();
  std::memcpy(p, &v, 64);
}
inline void _mm512_stream_si512(void* p, __m512i v) {
  if ((uintptr_t)p % 64) __builtin_trap();
  std::memcpy(p, &v, 64);
}

inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  const lane_by_lane::Lanes<uint16_t, 16> from(v);
  lane_by_lane::Lanes<uint32_t, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = from.lane[i];
  return to.as<__m512i>();
}
inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
  const lane_by_lane::Lanes<uint32_t, 16> from(v);
  lane_by_lane::Lanes<uint16_t, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = (uint16_t)from.lane[i];
  return to.as<__m256i>();
}

// Half precision: SIMDe converts single numbers, rounding to nearest even.
inline __m512 _mm512_cvtph_ps(__m256i v) {
  const lane_by_lane::Lanes<uint16_t, 16> from(v);
  lane_by_lane::Lanes<float, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = simde_float16_to_float32(simde_uint16_as_float16(from.lane[i]));
  return to.as<__m512>();
}
inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  const lane_by_lane::Lanes<float, 16> from(v);
  lane_by_lane::Lanes<uint16_t, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = simde_float16_as_uint16(simde_float16_from_float32(from.lane[i]));
  return to.as<__m256i>();
}

// SIMDe's own multiplies by 2^n, which overflows before the product does.
#undef _mm512_scalef_ps
#undef _mm512_scalef_pd
inline __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
  lane_by_lane::Lanes<float, 16> r(x);
  const lane_by_lane::Lanes<float, 16> e(n);
  for (int i = 0; i < 16; ++i) r.lane[i] = e.lane[i] == e.lane[i] ? std::ldexp(r.lane[i], (int)e.lane[i]) : e.lane[i];
  return r.as<__m512>();
}
inline __m512d _mm512_scalef_pd(__m512d x, __m512d n) {
  lane_by_lane::Lanes<double, 8> r(x);
  const lane_by_lane::Lanes<double, 8> e(n);
  for (int i = 0; i < 8; ++i) r.lane[i] = e.lane[i] == e.lane[i] ? std::ldexp(r.lane[i], (int)e.lane[i]) : e.lane[i];
  return r.as<__m512d>();
}

// Present without their aliases.
#if !defined(_MM_FROUND_NO_EXC)
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif
#if !defined(_mm512_shuffle_f32x4)
#define _mm512_shuffle_f32x4(a, b, imm8) simde_mm512_shuffle_f32x4(a, b, imm8)
#endif
#if !defined(_mm512_shuffle_f64x2)
#define _mm512_shuffle_f64x2(a, b, imm8) simde_mm512_shuffle_f64x2(a, b, imm8)
#endif

// AVX512-BF16: numbers of float32 rounded to nearest even, subnormal ones to zero; products of pairs added one after
// the other, each addition rounded.
namespace lane_by_lane {

inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
  if ((u & 0x7f800000) == 0) return (uint16_t)(u >> 16 & 0x8000);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) {
  const uint32_t u = (bits & 0x7f80) == 0 ? (uint32_t)(bits & 0x8000) << 16 : (uint32_t)bits << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

}  // namespace lane_by_lane
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
  const lane_by_lane::Lanes<float, 16> from(x);
  lane_by_lane::Lanes<uint16_t, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = lane_by_lane::to_bf16(from.lane[i]);
  return to.as<__m256bh>();
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const lane_by_lane::Lanes<float, 16> l(low), h(high);
  lane_by_lane::Lanes<uint16_t, 32> to;
  for (int i = 0; i < 32; ++i) to.lane[i] = lane_by_lane::to_bf16(i < 16 ? l.lane[i] : h.lane[i - 16]);
  return to.as<__m512bh>();
}
#undef _mm512_dpbf16_ps
inline __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  lane_by_lane::Lanes<float, 16> sum(c);
  const lane_by_lane::Lanes<uint16_t, 32> x(a), y(b);
  using lane_by_lane::from_bf16;
  for (int i = 0; i < 16; ++i)
    for (int j = 1; j >= 0; --j)
      sum.lane[i] = std::fma(from_bf16(x.lane[2 * i + j]), from_bf16(y.lane[2 * i + j]), sum.lane[i]);
  return sum.as<__m512>();
}

// AMX: registers of up to 16 rows of 64 bytes, shaped by LDTILECFG. A shape that a product's operands do not share, a
// register that has none, and a start row end the test, as they would fault.
namespace amx {

struct Register {
  int rows, bytes;
  unsigned char at[16][64];
};
inline thread_local Register registers[8];

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("AMX: %s\n", what);
  std::fflush(stdout);
  std::abort();
}
inline Register& shaped(int i) {
  require(registers[i].rows > 0, "a register without a shape");
  return registers[i];
}
inline void configure(const void* from) {
  const unsigned char* const p = (const unsigned char*)from;
  require(p[0] == 1 && p[1] == 0, "expected palette 1 and no start row");
  for (int i = 0; i < 8; ++i) {
    Register& r = registers[i];
    r = {p[48 + i], p[16 + 2 * i] + 256 * p[17 + 2 * i], {}};
    require(r.rows <= 16 && r.bytes <= 64 && (r.rows == 0) == (r.bytes == 0), "a shape that there is not");
  }
}
inline void load(int i, const void* from, int64_t stride) {
  Register& r = shaped(i);
  for (int row = 0; row < r.rows; ++row) std::memcpy(r.at[row], (const char*)from + row * stride, (size_t)r.bytes);
}
inline void store(int i, void* to, int64_t stride) {
  const Register& r = shaped(i);
  for (int row = 0; row < r.rows; ++row) std::memcpy((char*)to + row * stride, r.at[row], (size_t)r.bytes);
}
inline void zero(int i) { std::memset(shaped(i).at, 0, sizeof registers[i].at); }
inline void multiply(int c, int a, int b) {
  Register &sums = shaped(c), &x = shaped(a), &y = shaped(b);
  require(sums.rows == x.rows && sums.bytes == y.bytes && x.bytes == 4 * y.rows, "shapes that do not fit");
  for (int m = 0; m < sums.rows; ++m)
    for (int k = 0; k < y.rows; ++k)
      for (int n = 0; n < sums.bytes / 4; ++n) {
        float sum;
        uint16_t p[2], q[2];
        std::memcpy(&sum, sums.at[m] + 4 * n, 4);
        std::memcpy(p, x.at[m] + 4 * k, 4);
        std::memcpy(q, y.at[k] + 4 * n, 4);
        using lane_by_lane::from_bf16;
        for (int j = 0; j < 2; ++j) sum = std::fma(from_bf16(p[j]), from_bf16(q[j]), sum);
        std::memcpy(sums.at[m] + 4 * n, &sum, 4);
      }
}

}  // namespace amx
#define _tile_loadconfig(from) amx::configure(from)
#define _tile_release() (void)std::memset(amx::registers, 0, sizeof amx::registers)
#define _tile_zero(i) amx::zero(i)
#define _tile_loadd(i, from, stride) amx::load(i, from, stride)
#define _tile_stored(i, to, stride) amx::store(i, to, stride)
#define _tile_dpbf16ps(c, a, b) amx::multiply(c, a, b)
