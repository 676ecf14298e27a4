// Combinations of the parts of rows, both ways between a type and its accumulator's, and products of parts with parts.
#include <cmath>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "phm_linear_reference.h"

namespace test {
namespace {

// From one type to another: mix_parts or unmix_parts.
template <class In, class Out, class F>
void combine(F driver, const char* name, int64_t rows, int64_t parts, int64_t to_parts, int64_t length,
             Random& random) {
  using A = rf::acc_t<In>;
  const Guard guard = random.chance(0.6) ? Guard::behind : Guard::before;
  describe("%s %s to %s: %lld rows of %lld parts of %lld, to %lld", name, Format<In>::name, Format<Out>::name,
           (long long)rows, (long long)parts, (long long)length, (long long)to_parts);
  const auto value = [&] { return random.spiky(); };
  const int64_t stride = parts * length + random.integer(0, 3);
  const Buffer<In> from = input<In>((rows - 1) * stride + parts * length, value, guard, random.integer(0, 3));
  const Buffer<A> coefficients = input<A>(to_parts * parts, value, guard);
  Buffer<Out> to(rows * to_parts * length, guard, random.integer(0, 3));
  driver(rf::CombinePartsProblem{.parts = parts,
                                 .to_parts = to_parts,
                                 .length = length,
                                 .from = from.data(),
                                 .from_stride = stride,
                                 .coefficients = coefficients.data(),
                                 .to = to.data()},
         rows);
  check_combination({rows, stride, parts, length}, from, coefficients, to_parts, 8, to);
  CHECK(to.rest_untouched());
}

template <class T>
void products(int64_t rows, int64_t of_parts, int64_t parts, int64_t length, Random& random) {
  using A = rf::acc_t<T>;
  const Guard guard = random.chance(0.6) ? Guard::behind : Guard::before;
  describe("part products %s: %lld rows, %lld parts with %lld of %lld", Format<T>::name, (long long)rows,
           (long long)of_parts, (long long)parts, (long long)length);
  const auto value = [&] { return random.spiky(); };
  const int64_t stride = parts * length + random.integer(0, 3);
  const Buffer<A> of = input<A>(rows * of_parts * length, value, guard, random.integer(0, 3));
  const Buffer<T> with = input<T>((rows - 1) * stride + parts * length, value, guard, random.integer(0, 3));
  std::vector<double> sums(of_parts * parts, 1.5), alone = sums;
  const rf::PartProductsProblem args = {.of_parts = of_parts,
                                        .parts = parts,
                                        .length = length,
                                        .of = of.data(),
                                        .with = with.data(),
                                        .with_stride = stride,
                                        .sums = nullptr};
  rf::add_part_products(Format<T>::dtype, args, rows, sums.data());
  const int64_t used = threads;
  threads = 1;
  rf::add_part_products(Format<T>::dtype, args, rows, alone.data());
  threads = used;
  CHECK(sums == alone);  // the same bits with any number of threads
  check_part_products({rows, stride, parts, length}, of, of_parts, with, 1.5, 8,
                      [&](int64_t j, int64_t i) { return (A)sums[j * parts + i]; });
}

template <class T>
void all() {
  using A = rf::acc_t<T>;
  Random random(2100 + (int)Format<T>::dtype);
  // Parts shorter than a vector, a vector, with tails, and beyond a chain of additions of a scalar.
  constexpr int64_t kLengths[] = {1, 2, 7, 8, 15, 16, 17, 33, 64, 131, 300}, kParts[] = {1, 2, 3, 4, 5, 7, 8, 13, 16};
  const auto mix = [](const rf::CombinePartsProblem& a, int64_t rows) { rf::mix_parts(Format<T>::dtype, a, rows); };
  const auto unmix = [](const rf::CombinePartsProblem& a, int64_t rows) { rf::unmix_parts(Format<T>::dtype, a, rows); };
  for (int i = 0; i < fewer(60); ++i) {
    const int64_t rows = random.integer(1, 70), length = random.pick(kLengths);
    combine<T, A>(mix, "mix", rows, random.pick(kParts), random.pick(kParts), length, random);
    combine<A, T>(unmix, "unmix", rows, random.pick(kParts), random.pick(kParts), length, random);
    products<T>(rows, random.pick(kParts), random.pick(kParts), length, random);
  }
}

}  // namespace

TEST(phm_linear) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
