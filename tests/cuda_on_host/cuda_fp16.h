// float16 as the toolkit's header of this name has it, as far as kernels use it.
#pragma once
#include <cuda_runtime.h>

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float value;
  if (exponent == 31)
    value = fraction ? NAN : INFINITY;
  else
    value = exponent ? ldexpf((float)(fraction + 1024), exponent - 25) : ldexpf((float)fraction, -24);
  return h.bits >> 15 ? -value : value;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = (uint16_t)(__float_as_uint(x) >> 31 << 15);
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {(uint16_t)(sign | 0x7c00)};  // half way to the number after the largest
  int exponent = -14;  // of subnormal numbers, which share the smallest normal one's
  if (size >= 0x1p-14f) exponent = ilogbf(size);
  // In units of the last place, rounded to even; a carry out of the fraction moves on to the exponent by itself.
  const int units = (int)nearbyintf(ldexpf(size, 10 - exponent));
  return {(uint16_t)(sign | (units + ((exponent + 14) << 10)))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
