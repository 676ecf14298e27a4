// The packed panels: their order, and zeros where a panel is not full. Widened rows.
#include <vector>

#include "cpu/isa/kernels.h"
#include "memory.h"

namespace test {
namespace {

template <class T>
void pack(void (*kernel)(const rf::PackArgs&), int64_t width, bool transposed, rf::MatrixView view, int64_t i0,
          int64_t count, int64_t k0, int64_t k, int64_t elements, Random& random) {
  using A = rf::acc_t<T>;
  const Buffer<T> from = input<T>(elements, [&] { return random.spiky(); });
  view.data = from.data();
  const int64_t panels = (count + width - 1) / width;
  Buffer<A> to(panels * k * width, random.chance(0.5) ? Guard::behind : Guard::before);
  kernel({.from = view, .across = transposed, .i0 = i0, .count = count, .k0 = k0, .k = k, .to = to.data()});
  bool right = true;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t index = p * width + i, row = transposed ? k0 + j : i0 + index,
                      column = transposed ? i0 + index : k0 + j;
        const double expected = index < count ? from.value(view.row_offset(row) + column * view.col_stride) : 0;
        right = right && to.result((p * k + j) * width + i) == expected;
      }
  CHECK(right);
  CHECK(to.rest_untouched());
}

template <class T>
void widen(Random& random) {
  for (int i = 0; i < 40; ++i) {
    const int64_t i0 = random.integer(0, 3), count = random.integer(1, 9), k0 = random.integer(0, 5);
    const int64_t k = random.pick({1, 2, 7, 15, 16, 17, 33, 50}), columns = k0 + k;
    rf::MatrixView view = random.chance(0.5) ? rf::MatrixView{nullptr, 1, columns, 0, 1}
                                             : rf::MatrixView{nullptr, 3, 4 * columns + 3, columns + 1, 1};
    describe("widen %s, [%lld, +%lld) x [%lld, +%lld)", Format<T>::name, (long long)i0, (long long)count, (long long)k0,
             (long long)k);
    const Buffer<T> from = input<T>(view.row_offset(i0 + count - 1) + columns, [&] { return random.spiky(); });
    view.data = from.data();
    Buffer<rf::acc_t<T>> to(count * k);
    rf::kernels().widen_a[(int)Format<T>::dtype](
        {.from = view, .across = false, .i0 = i0, .count = count, .k0 = k0, .k = k, .to = to.data()});
    bool right = true;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < k; ++c)
        right = right && to.result(r * k + c) == from.value(view.row_offset(i0 + r) + k0 + c);
    CHECK(right && to.rest_untouched());
  }
}

// Where a micro-kernel that takes K by steps finds slot s of row (A) or column (B) w of a panel: squares of 16 x 16.
int64_t in_squares(bool is_a, int64_t s, int64_t w) {
  const int64_t first = s / 16 * 16 * 32;
  return first + (is_a ? w * 16 + s % 16 : w / 16 * 256 + s % 16 * 16 + w % 16);
}

// Slots of two numbers of bf16, the last one's second zero where K is odd, and further zeros up to a whole step; T is
// float where the operand is rounded.
template <class T>
void pack_pairs(Random& random) {
  const rf::PairKernels& kernels = *rf::kernels().pairs;
  const bool wide = std::is_same_v<T, float>;
  for (int i = 0; i < 900; ++i) {
    const int way = (int)random.integer(0, 2);  // A's panels, B's panels, A's rows along K
    const bool along = way == 2, across = !along && random.chance(0.5);
    const bool squares = kernels.step != 0, is_a = way != 1;
    const int64_t width = !is_a ? kernels.nr : along && !squares ? 1 : kernels.mr;
    const int64_t i0 = random.integer(0, 5), count = random.integer(1, along && !squares ? 9 : 3 * width),
                  k0 = random.integer(0, 5);
    const int64_t k = random.pick({1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 64, 65, 130});
    const int64_t rows = across ? k0 + k : i0 + count, columns = across ? i0 + count : k0 + k;
    const rf::MatrixView views[] = {{nullptr, 1, columns, 0, 1},
                                    {nullptr, 3, 3 * columns, columns, 1},
                                    {nullptr, 1, 1, 0, rows},
                                    {nullptr, 1, 2 * columns, 0, 2}};
    rf::MatrixView view = views[random.integer(0, along ? 1 : 3)];
    describe("pack pairs of %s, way %d%s, [%lld, +%lld) x [%lld, +%lld)", Format<T>::name, way, across ? " across" : "",
             (long long)i0, (long long)count, (long long)k0, (long long)k);
    const Buffer<T> from =
        input<T>(view.row_offset(rows - 1) + (columns - 1) * view.col_stride + 1, [&] { return random.spiky(); });
    view.data = from.data();
    const int64_t panels = (count + width - 1) / width, whole = (k + 1) / 2,
                  slots = squares ? (whole + 15) / 16 * 16 : whole;
    Buffer<bf16> to(2 * panels * slots * width, random.chance(0.5) ? Guard::behind : Guard::before);
    (along  ? kernels.lay_out_a
     : !way ? kernels.pack_a
            : kernels.pack_b)[wide](
        {.from = view, .across = across, .i0 = i0, .count = count, .k0 = k0, .k = k, .to = to.data()});
    bool right = true;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t j = 0; j < 2 * slots; ++j)
        for (int64_t w = 0; w < width; ++w) {
          const int64_t index = p * width + w, row = across ? k0 + j : i0 + index,
                        column = across ? i0 + index : k0 + j;
          const bool there = index < count && j < k;
          const double expected =
              there ? rounded<bf16>(from.value(view.row_offset(row) + column * view.col_stride)) : 0;
          if (squares && is_a && index >= count) continue;  // rows that are not loaded
          const int64_t slot = squares ? in_squares(is_a, j / 2, w) : j / 2 * width + w;
          right = right && to.result(2 * (p * slots * width + slot) + j % 2) == expected;
        }
    CHECK(right);
    CHECK(to.rest_untouched());
  }
}

template <class T>
void all() {
  Random random(1400 + (int)Format<T>::dtype);
  const rf::Kernels& kernels = rf::kernels();
  const int t = (int)Format<T>::dtype;
  for (bool is_a : {true, false})
    for (bool transposed : {false, true})
      for (int arrangement = 0; arrangement < 4; ++arrangement)
        for (int i = 0; i < 40; ++i) {
          const int64_t width = is_a ? kernels.mr[t] : kernels.nr[t];
          const int64_t i0 = random.integer(0, 5), count = random.integer(1, 3 * width), k0 = random.integer(0, 5);
          const int64_t k = random.pick({1, 2, 7, 15, 16, 17, 33, 50});
          const int64_t rows = transposed ? k0 + k : i0 + count, columns = transposed ? i0 + count : k0 + k;
          const rf::MatrixView views[] = {{nullptr, 1, columns, 0, 1},
                                          {nullptr, 1, 1, 0, rows},
                                          {nullptr, 1, 2 * columns, 0, 2},
                                          {nullptr, 3, 3 * columns, columns, 1}};
          const rf::MatrixView view = views[arrangement];
          describe("pack %s of %s%s, arrangement %d, [%lld, +%lld) x [%lld, +%lld)", is_a ? "a" : "b", Format<T>::name,
                   transposed ? " transposed" : "", arrangement, (long long)i0, (long long)count, (long long)k0,
                   (long long)k);
          pack<T>(is_a ? kernels.pack_a[t] : kernels.pack_b[t], width, transposed, view, i0, count, k0, k,
                  view.row_offset(rows - 1) + (columns - 1) * view.col_stride + 1, random);
        }
  widen<T>(random);
}

}  // namespace

TEST(packing) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  Random random(1500);
  if (!rf::kernels().pairs) return;
  pack_pairs<bf16>(random);
  pack_pairs<float>(random);
}

}  // namespace test
