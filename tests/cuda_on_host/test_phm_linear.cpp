// Combinations of the parts of rows, and products of parts with parts, against double precision.
#include <cmath>
#include <vector>

#include "cuda/launch.h"
#include "device_memory.h"
#include "phm_linear_reference.h"

namespace test {
namespace {

// From, the type of what is combined: T or its accumulator's.
template <class T, class From>
void combine(int64_t rows, int64_t parts, int64_t to_parts, int64_t length, Random& random) {
  using A = rf::acc_t<T>;
  describe("combine parts %s to %s: %lld rows of %lld parts of %lld, to %lld", Format<From>::name, Format<T>::name,
           (long long)rows, (long long)parts, (long long)length, (long long)to_parts);
  const auto value = [&] { return random.spiky(); };
  const int64_t stride = parts * length + random.integer(0, 3);
  const Buffer<From> from =
      input<From>((rows - 1) * stride + parts * length, value, Guard::behind, random.integer(0, 3));
  const Buffer<A> coefficients = input<A>(to_parts * parts, value);
  Buffer<T> to(rows * to_parts * length, Guard::behind, random.integer(0, 3));
  {
    const Lent f(from), c(coefficients), t(to);
    rf::cuda::launch_combine_parts(Format<T>::dtype,
                                   {{.parts = parts,
                                     .to_parts = to_parts,
                                     .length = length,
                                     .from = from.data(),
                                     .from_stride = stride,
                                     .coefficients = coefficients.data(),
                                     .to = to.data()},
                                    rows,
                                    /*from_is_acc=*/!std::is_same_v<From, T>},
                                   nullptr);
  }
  check_combination({rows, stride, parts, length}, from, coefficients, to_parts, sum_error(parts), to);
  CHECK(to.rest_untouched());
}

template <class T>
void products(int64_t rows, int64_t of_parts, int64_t parts, int64_t length, Random& random) {
  using A = rf::acc_t<T>;
  describe("part products %s: %lld rows, %lld parts with %lld of %lld", Format<T>::name, (long long)rows,
           (long long)of_parts, (long long)parts, (long long)length);
  const auto value = [&] { return random.spiky(); };
  const int64_t stride = parts * length + random.integer(0, 3);
  const Buffer<A> of = input<A>(rows * of_parts * length, value, Guard::behind, random.integer(0, 3));
  const Buffer<T> with = input<T>((rows - 1) * stride + parts * length, value, Guard::behind, random.integer(0, 3));
  const int64_t blocks = rf::cuda::part_products_blocks(Format<T>::dtype, rows, length);
  Buffer<A> sums(blocks * of_parts * parts);
  {
    const Lent o(of), w(with), s(sums);
    rf::cuda::launch_part_products(Format<T>::dtype,
                                   {{.of_parts = of_parts,
                                     .parts = parts,
                                     .length = length,
                                     .of = of.data(),
                                     .with = with.data(),
                                     .with_stride = stride,
                                     .sums = sums.data()},
                                    rows},
                                   nullptr);
  }
  check_part_products({rows, stride, parts, length}, of, of_parts, with, 0, sum_error(rows * length),
                      [&](int64_t j, int64_t i) {
                        double sum = 0;
                        for (int64_t block = 0; block < blocks; ++block)
                          sum += sums.result((block * of_parts + j) * parts + i);
                        return sum;
                      });
  CHECK(sums.rest_untouched());
}

template <class T>
void all() {
  using A = rf::acc_t<T>;
  Random random(900 + (int)Format<T>::dtype);
  // Parts shorter than a vector, a vector, and with tails; fewer of them than a thread or a block takes, and more.
  constexpr int64_t kLengths[] = {1, 2, 7, 8, 16, 17, 33, 131}, kParts[] = {1, 2, 3, 4, 5, 8, 13, 17};
  for (int i = 0; i < 12; ++i) {
    const int64_t rows = random.integer(1, 40), length = random.pick(kLengths);
    combine<T, T>(rows, random.pick(kParts), random.pick(kParts), length, random);
    combine<T, A>(rows, random.pick(kParts), random.pick(kParts), length, random);
    products<T>(rows, random.pick(kParts), random.pick(kParts), length, random);
  }
  products<T>(700, 4, 2, 40, random);  // several blocks
  describe("parts %s of nothing", Format<T>::name);
  rf::cuda::CombineParts of_nothing = {};  // no rows, or no elements in them
  of_nothing.parts = 2;
  of_nothing.to_parts = 4;
  for (const int64_t length : {5, 0}) {
    of_nothing.rows = length ? 0 : 3;
    of_nothing.length = length;
    of_nothing.from_stride = 2 * length;
    rf::cuda::launch_combine_parts(Format<T>::dtype, of_nothing, nullptr);
  }
  rf::cuda::PartProducts no_products = {};
  no_products.of_parts = 4;
  no_products.parts = 2;
  no_products.length = 5;
  no_products.with_stride = 10;
  rf::cuda::launch_part_products(Format<T>::dtype, no_products, nullptr);
  CHECK(rf::cuda::part_products_blocks(Format<T>::dtype, 0, 5) == 0);
}

}  // namespace

TEST(phm_linear) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
