// Half-precision conversions: every bit pattern read, and floats written at, next to and between all of them.
#include <cmath>
#include <cstring>

#include "cpu/isa/kernels.h"
#include "memory.h"

namespace test {
namespace {

// Packing a row of B's with K = 1 widens it; count ends in a partial vector.
template <class T>
void every_pattern_read() {
  describe("%s read", Format<T>::name);
  constexpr int64_t count = 65536 + 65535;
  Buffer<T> from(count);
  for (int64_t i = 0; i < count; ++i) from[i] = {(uint16_t)i};
  from.read_only();
  const int t = (int)Format<T>::dtype;
  const int64_t width = rf::kernels().nr[t];
  Buffer<float> to((count + width - 1) / width * width);
  rf::kernels().pack_b[t]({.from = {from.data(), 1, count, 0, 1},
                           .across = true,
                           .i0 = 0,
                           .count = count,
                           .k0 = 0,
                           .k = 1,
                           .to = to.data()});
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double expected = from.value(i), got = to.value(i);
    const bool same =
        expected != expected ? got != got : got == expected && std::signbit(got) == std::signbit(expected);
    if (!same && wrong++ == 0) CHECK(!"pattern" && i < 0);
  }
  CHECK(wrong == 0);
}

// A product with 1 writes its factor rounded.
template <class T>
void every_pattern_written() {
  describe("%s written", Format<T>::name);
  const int t = (int)Format<T>::dtype;
  const int64_t mr = rf::kernels().mr[t], nr = rf::kernels().nr[t], patterns = 65536, per_pattern = 6;
  const int64_t count = patterns * per_pattern - 1, padded = (count + nr - 1) / nr * nr;
  Buffer<float> a(mr), b(padded);
  for (int64_t i = 0; i < mr; ++i) a[i] = i == 0;
  for (int64_t i = 0; i < padded; ++i) b[i] = 0;
  for (int64_t p = 0; p < patterns; ++p) {
    // The value, the tie with the next one, and floats on both sides of each.
    const float value = (float)to_double(T{(uint16_t)p});
    const T next = {(uint16_t)(p + 1)};
    double above = to_double(next);
    if (std::isinf(above)) above = std::copysign(std::ldexp(1, Format<T>::digits + ulp_exponent<T>(value)), above);
    const float tie = std::isfinite(value) && std::isfinite(above) ? (float)(((double)value + above) / 2) : value;
    const float points[] = {value, std::nextafterf(value, INFINITY), std::nextafterf(value, -INFINITY),
                            tie,   std::nextafterf(tie, INFINITY),   std::nextafterf(tie, -INFINITY)};
    for (int64_t i = 0; i < per_pattern && p * per_pattern + i < count; ++i) b[p * per_pattern + i] = points[i];
  }
  b.read_only();
  Buffer<T> c(count);
  Buffer<float> tiles(mr * padded);
  rf::Epilogue e = {};
  e.c = c.data();
  e.c_stride = count;
  rf::GemmBlockArgs block = {};
  block.a = a.data();
  block.a_row = 1;
  block.a_k = block.a_panel = mr;
  block.b = b.data();
  block.a_count = block.k = block.chain = 1;
  block.b_count = count;
  block.tiles = tiles.data();
  block.first = block.last = true;
  block.epilogue = e;
  rf::kernels().gemm_block[t](block);
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double expected = rounded<T>(b.value(i)), got = c.result(i);
    if ((expected != expected ? got == got : got != expected) && wrong++ == 0)
      check(false, "%a: got %a, expected %a", b.value(i), got, expected);
  }
  CHECK(wrong == 0);
  CHECK(c.rest_untouched());
}

// The sign of zero and of NaN is kept: dx = g (x - y) with a negative g makes the negative zeros.
template <class T>
void signs() {
  describe("%s signs", Format<T>::name);
  const Buffer<T> x = input<T>(21, [] { return 1.0; }), g = input<T>(1, [] { return -1.0; });
  Buffer<T> dx(21);
  rf::kernels().mse_loss_backward[(int)Format<T>::dtype](x.data(), x.data(), g.data(), false, 1.0, dx.data(), nullptr,
                                                         21);
  bool negative = true;
  for (int64_t i = 0; i < 21; ++i) negative = negative && dx.data()[i].bits == 0x8000;
  CHECK(negative);
}

template <class T>
void all() {
  every_pattern_read<T>();
  every_pattern_written<T>();
  signs<T>();
}

}  // namespace

TEST(conversions) {
  each_dtype([](auto element) {
    if constexpr (!std::is_floating_point_v<decltype(element)>) all<decltype(element)>();
  });
}

}  // namespace test
