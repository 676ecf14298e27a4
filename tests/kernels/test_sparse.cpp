// A gradient's large entries: which are listed, the transposed list, and their products.
#include <cmath>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "memory.h"

namespace test {
namespace {

// Entries that are mostly 0, and at the bound itself, which does not exceed it.
template <class A>
double entry(Random& random, double bound) {
  if (random.chance(0.02)) return kNaN;
  if (random.chance(0.1)) return random.chance(0.5) ? (double)(A)bound : -(double)(A)bound;
  return random.chance(0.1) ? random.spiky() : random.chance(0.5) ? 0.0 : 0.9 * bound * (2 * random.uniform() - 1);
}

template <class T>
void lists_and_products(int64_t rows, int64_t columns, int64_t width, Random& random) {
  using A = rf::acc_t<T>;
  const rf::DType dtype = Format<T>::dtype;
  const Guard guard = random.chance(0.6) ? Guard::behind : Guard::before;
  describe("sparse %s %lld x %lld -> %lld", Format<T>::name, (long long)rows, (long long)columns, (long long)width);
  std::vector<double> bounds(rows);
  for (double& b : bounds) b = random.chance(0.2) ? 0 : 1e-3;
  int64_t at = 0;
  const Buffer<A> gradient = input<A>(rows * columns, [&] { return entry<A>(random, bounds[at++ / columns]); }, guard);
  std::vector<bool> listed(rows * columns);
  int64_t expected = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    listed[i] = !(std::fabs(gradient.value(i)) <= (A)bounds[i / columns]);
    expected += listed[i];
  }

  rf::SparseMatrix m;
  CHECK(expected == 0 ||
        !rf::list_large_entries(dtype, gradient.data(), rows, columns, bounds.data(), expected - 1, &m));
  CHECK(rf::list_large_entries(dtype, gradient.data(), rows, columns, bounds.data(), expected, &m));
  CHECK(m.row_begin.back() == expected);
  const A* values = (const A*)m.values.data();
  bool right = true;
  int64_t next = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    if (i % columns == 0) right = right && m.row_begin[i / columns] == next;
    if (!listed[i]) continue;
    right = right && m.columns[next] == i % columns && !std::memcmp(&values[next], gradient.data() + i, sizeof(A));
    ++next;
  }
  CHECK(right);

  const rf::SparseMatrix t = rf::transposed(dtype, m, columns);
  right = true;
  next = 0;
  for (int64_t c = 0; c < columns; ++c) {
    right = right && t.row_begin[c] == next;
    for (int64_t r = 0; r < rows; ++r) {
      if (!listed[r * columns + c]) continue;
      right = right && t.columns[next] == r &&
              !std::memcmp((const A*)t.values.data() + next, gradient.data() + r * columns + c, sizeof(A));
      ++next;
    }
  }
  CHECK(right);

  const int64_t stride = width + random.integer(0, 3);
  const auto value = [&] { return random.spiky() / 2; };
  const Buffer<T> of_columns = input<T>((columns - 1) * stride + width, value, guard, random.integer(0, 3)),
                  of_rows = input<T>((rows - 1) * stride + width, value, guard, random.integer(0, 3));
  for (bool transposed : {false, true})
    for (bool add : {false, true}) {
      const int64_t out = transposed ? columns : rows, in = transposed ? rows : columns;
      const Buffer<T>& b = transposed ? of_rows : of_columns;
      Buffer<A> c((out - 1) * stride + width, guard, random.integer(0, 3));
      std::vector<double> before(out * width);
      for (int64_t i = 0; add && i < out; ++i)
        for (int64_t j = 0; j < width; ++j) {
          c[i * stride + j] = (A)value();
          before[i * width + j] = c.value(i * stride + j);
        }
      rf::sparse_product(dtype, transposed ? t : m, {b.data(), 1, stride, 0, 1}, width, c.data(), stride, add);
      {
        Comparison<A> compare("product");
        for (int64_t i = 0; i < out; ++i)
          for (int64_t j = 0; j < width; ++j) {
            double sum = before[i * width + j], units = std::fabs(sum);
            for (int64_t k = 0; k < in; ++k) {
              const int64_t g = transposed ? k * columns + i : i * columns + k;
              if (!listed[g]) continue;
              sum += gradient.value(g) * b.value(k * stride + j);
              units += std::fabs(gradient.value(g) * b.value(k * stride + j));
            }
            compare.add(c.result(i * stride + j), sum, units * 8, i * stride + j);
          }
      }
      CHECK(c.rest_untouched());
    }
}

template <class T>
void all() {
  Random random(1700 + (int)Format<T>::dtype);
  constexpr int64_t kColumns[] = {1, 3, 31, 32, 33, 64, 129, 300}, kWidths[] = {1, 5, 8, 16, 33, 64, 65, 130, 200};
  for (int i = 0; i < fewer(40); ++i)
    lists_and_products<T>(random.integer(1, 20), random.pick(kColumns), random.pick(kWidths), random);
}

}  // namespace

TEST(sparse) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
