// The GEMM engine's plan: every combination of operand types, layouts and a C that is added to, with K on either side
// of each block constant and either side of the product the longer one. Scratch memory has a guard page too
// (threads.cpp).
#include <array>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cpu/drivers/gemm_packed.h"
#include "cpu/tuning.h"
#include "gemm_reference.h"
#include "matrices.h"

namespace test {
namespace {

struct EngineCall {
  int64_t m, n, k;
  bool a_transposed, b_transposed, accumulate, bias, padded;
};

// A of type A and B of type B beside T, and C of type C, as linear_cross_entropy, linear_nll and phm_linear multiply.
template <class T, class A, class C, class B = T>
void engine_product(const EngineCall& c, Random& random) {
  constexpr bool wide_a = !std::is_same_v<A, T>, wide_b = !std::is_same_v<B, T>, wide_c = !std::is_same_v<C, T>;
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const Operand arrangement = c.padded ? Operand::padded : Operand::contiguous;
  const auto value = [&] { return random.spiky() / 2; };
  const Matrix<A> a(arrangement, c.a_transposed ? c.k : c.m, c.a_transposed ? c.m : c.k, guard, value);
  const Matrix<B> b(arrangement, c.b_transposed ? c.n : c.k, c.b_transposed ? c.k : c.n, guard, value);
  const Buffer<C> bias = input<C>(c.n, value, guard);
  const int64_t stride = c.n + (c.padded ? 3 : 0), size = (c.m - 1) * stride + c.n;
  std::vector<C> before(size);
  for (C& x : before) x = from_double<C>(value());
  rf::GemmProblem g = {.m = c.m,
                       .n = c.n,
                       .k = c.k,
                       .a = a.view,
                       .a_transposed = c.a_transposed,
                       .b = b.view,
                       .b_transposed = c.b_transposed,
                       .c = nullptr,
                       .c_stride = stride,
                       .bias = c.bias ? bias.data() : nullptr,
                       .wide_a = wide_a,
                       .wide_b = wide_b,
                       .wide_c = wide_c,
                       .accumulate = c.accumulate};

  // Beside pairs of bf16 a factor of floats is rounded to them.
  const bool rounds = rf::pair_kernels(Format<T>::dtype, g);
  const auto factor = [&](double x) { return rounds ? rounded<bf16>(x) : x; };
  const auto rows = along_k<A>(g.a, g.a_transposed, g.m, g.k, factor);
  const auto columns = along_k<B>(g.b, !g.b_transposed, g.n, g.k, factor);

  std::vector<C> first;
  for (int64_t n : {1, 3}) {
    threads = n;
    describe("gemm engine of %s, B %s, A %s, C %s%s, %lld x %lld x %lld%s%s%s, %lld threads", Format<T>::name,
             Format<B>::name, Format<A>::name, Format<C>::name, c.accumulate ? " +=" : "", (long long)c.m,
             (long long)c.n, (long long)c.k, c.a_transposed ? ", A^T" : "", c.b_transposed ? ", B^T" : "",
             c.padded ? ", padded" : "", (long long)n);
    Buffer<C> y(size, guard, random.integer(0, 3));
    for (int64_t i = 0; c.accumulate && i < c.m; ++i)
      std::copy_n(before.data() + i * stride, c.n, y.data() + i * stride);
    g.c = y.data();
    const With with(g);
    rf::gemm(Format<T>::dtype, g);
    Comparison<C> comparison("c");
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < c.n; ++j) {
        const int64_t at = i * stride + j;
        const double result = y.result(at);
        // On more threads it is right already if it has the same bits; on one, the reference is what takes the time.
        if (!first.empty() || random.chance(0.8)) continue;
        Approximate sum = dot(rows.data() + i * g.k, columns.data() + j * g.k, g.k);
        if (c.accumulate) sum.add(to_double(before[at]));
        if (c.bias) sum.add(bias.value(j));
        comparison.add(result, sum.value, sum.units, at);
      }
    CHECK(y.rest_untouched());
    if (first.empty())
      first = y.copy();
    else
      CHECK(!std::memcmp(first.data(), y.data(), size * sizeof(C)));
  }
  threads = 2;
}

template <class T, class A, class C, class B = T>
void each_size(bool accumulate, Random& random) {
  // Rows times columns: either side the longer one, one of them beyond what is packed for all threads at a time, few
  // and many register tiles.
  std::vector<std::array<int64_t, 2>> sides = {
      {37, 70}, {70, 37}, {9, rf::tuning::kPackedColumns + 40}, {rf::tuning::kPackedColumns + 40, 9}};
  std::vector<int64_t> depths = {1,
                                 rf::tuning::kShortK,
                                 rf::tuning::kShortK + 1,
                                 rf::tuning::kGemmChain,
                                 rf::tuning::kBlockK + 1,
                                 rf::tuning::kDeepBlockK,
                                 rf::tuning::kDeepBlockK + 1,
                                 rf::tuning::kBlockKInPlace,
                                 rf::tuning::kBlockKInPlace + 1,
                                 2 * rf::tuning::kBlockKInPlace + 3};
  if (std::is_same_v<T, bf16> && rf::kernels().pairs)
    depths.insert(depths.end(), {2 * rf::tuning::kShortK, 2 * rf::tuning::kShortK + 1, 2 * rf::tuning::kBlockK + 1,
                                 2 * rf::tuning::kDeepBlockK + 3});
  // Several pieces of AMX in both directions; K in whole squares, which A in place has to have, and one more; chains.
  if (std::is_same_v<T, bf16> && rf::kernels().pairs && rf::kernels().pairs->step) {
    sides.push_back({2 * rf::tuning::kAmxBlockRows + 5, rf::tuning::kAmxGroupColumns + 40});
    depths.insert(depths.end(), {96, 97, 2 * rf::tuning::kAmxChain, 2 * rf::tuning::kAmxChain + 32});
  }
  for (bool a_transposed : {false, true})
    for (bool b_transposed : {false, true})
      for (const auto& side : sides)
        for (int64_t k : depths) {
          // Millions of random numbers are what takes the time.
          const bool large = std::max(side[0], side[1]) * k > 100 * rf::tuning::kBlockKInPlace;
          if (random.chance(quick ? 0.9 : large ? 0.8 : 0.0)) continue;
          engine_product<T, A, C, B>({.m = side[0],
                                      .n = side[1],
                                      .k = k,
                                      .a_transposed = a_transposed,
                                      .b_transposed = b_transposed,
                                      .accumulate = accumulate,
                                      .bias = random.chance(0.5),
                                      .padded = random.chance(0.3)},
                                     random);
        }
  for (int64_t m : {1, 100})  // C as it is, or zero
    engine_product<T, A, C, B>({.m = m,
                                .n = 40,
                                .k = 0,
                                .a_transposed = false,
                                .b_transposed = true,
                                .accumulate = accumulate,
                                .bias = true,
                                .padded = false},
                               random);
}

template <class T>
void each_type(Random& random) {
  using A = rf::acc_t<T>;
  each_size<T, T, T>(false, random);
  each_size<T, A, A>(true, random);
  if constexpr (!std::is_same_v<T, A>) {
    each_size<T, A, A>(false, random);
    each_size<T, A, T>(false, random);
    each_size<T, T, A>(false, random);
    each_size<T, T, A>(true, random);
    each_size<T, T, T, A>(false, random);
    each_size<T, T, A, A>(true, random);
  }
}

// A caller that breaks what the engine assumes gets an exception, not a write to memory that is not its own.
template <class F>
bool refused(const rf::GemmProblem& right, F&& spoil) {
  rf::GemmProblem g = right;
  spoil(g);
  try {
    rf::gemm(rf::DType::bf16, g);
  } catch (const std::logic_error&) {
    return true;
  }
  return false;
}

void broken_assumptions() {
  describe("gemm engine: broken assumptions are refused");
  Random random(3);
  const auto one = [] { return 1.0; };
  const Matrix<bf16> a(Operand::contiguous, 40, 30, Guard::behind, one),
      b(Operand::contiguous, 50, 30, Guard::behind, one);
  Buffer<float> c(40 * 50);
  const rf::GemmProblem g = {.m = 40,
                             .n = 50,
                             .k = 30,
                             .a = a.view,
                             .a_transposed = false,
                             .b = b.view,
                             .b_transposed = true,
                             .c = c.data(),
                             .c_stride = 50,
                             .wide_c = true,
                             .accumulate = true};
  CHECK(refused(g, [](rf::GemmProblem& x) { x.wide_c = false; }));
  CHECK(refused(g, [](rf::GemmProblem& x) { x.c = nullptr; }));
  CHECK(refused(g, [](rf::GemmProblem& x) { x.c_stride = 49; }));
  CHECK(refused(g, [](rf::GemmProblem& x) { x.a.data = nullptr; }));
  CHECK(refused(g, [](rf::GemmProblem& x) { x.k = -1; }));
}

}  // namespace

TEST(gemm_engine) {
  Random random(1313);
  each_dtype([&](auto element) { each_type<decltype(element)>(random); });
  broken_assumptions();
}

}  // namespace test
