// The GEMM through gemm() of drivers.h: every path, every arrangement of the operands, tails, blocks of K, epilogues.
#include <cmath>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "gemm_reference.h"
#include "matrices.h"

namespace test {
namespace {

struct Call {
  int64_t m, n, k;
  Operand a, b;
  bool a_transposed, b_transposed, bias, preactivation;
  Activation activation;
};

int64_t runs_of_path[6] = {};

template <class T>
void product(const Call& c, Random& random, std::vector<T>* keep = nullptr) {
  const Guard guard = random.chance(0.7) ? Guard::behind : Guard::before;
  const auto value = [&] { return random.spiky() / 2; };
  // As MatrixView describes memory: rows of a are M, or K where transposed; rows of b are N where "transposed".
  Matrix<T> a(c.a, c.a_transposed ? c.k : c.m, c.a_transposed ? c.m : c.k, guard, value);
  Matrix<T> b(c.b, c.b_transposed ? c.n : c.k, c.b_transposed ? c.k : c.n, guard, value);
  const Buffer<T> bias = input<T>(c.n, value, guard);
  const int64_t stride = c.n + random.integer(0, 2), size = (c.m - 1) * stride + c.n;
  Buffer<T> y(size, guard, random.integer(0, 3)), z(size, guard, random.integer(0, 3));
  const rf::GemmProblem g = {.m = c.m,
                             .n = c.n,
                             .k = c.k,
                             .a = a.view,
                             .a_transposed = c.a_transposed,
                             .b = b.view,
                             .b_transposed = c.b_transposed,
                             .c = y.data(),
                             .c_stride = stride,
                             .bias = c.bias ? bias.data() : nullptr,
                             .activation = c.activation,
                             .preactivation = c.preactivation ? z.data() : nullptr};
  const rf::GemmPath path = rf::gemm_path(Format<T>::dtype, g);
  ++runs_of_path[(int)path];
  describe("gemm %s m=%lld n=%lld k=%lld a=%s%s b=%s%s bias=%d pre=%d %s path=%d", Format<T>::name, (long long)c.m,
           (long long)c.n, (long long)c.k, kOperandNames[(int)c.a], c.a_transposed ? "^T" : "", kOperandNames[(int)c.b],
           c.b_transposed ? "^T" : "", c.bias, c.preactivation, name_of(c.activation), (int)path);
  const With with(g);
  rf::gemm(Format<T>::dtype, g);

  check_product(g, y, z, [](double x) { return x; });
  if (keep) *keep = y.copy();
}

template <class T>
void random_products(int count, Random& random) {
  constexpr int64_t kSmall[] = {1, 2, 3, 5, 7, 8, 10, 13, 15, 16, 17, 31, 32, 33};
  constexpr int64_t kLarge[] = {40, 47, 64, 65, 97, 100, 129, 170};
  constexpr int64_t kDepth[] = {0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 100, 200, 385, 500};
  const auto extent = [&] { return random.chance(0.5) ? random.pick(kSmall) : random.pick(kLarge); };
  for (int i = 0; i < count; ++i) {
    Call c = {};
    c.m = extent();
    c.n = extent();
    c.k = random.pick(kDepth);
    const auto operand = [&] { return random.chance(0.4) ? Operand::contiguous : (Operand)random.integer(0, 6); };
    c.a = operand();
    c.b = operand();
    c.a_transposed = random.chance(0.4);
    c.b_transposed = random.chance(0.6);
    c.bias = random.chance(0.5);
    c.preactivation = random.chance(0.3);
    c.activation = random.chance(0.5) ? Activation::none : random.pick(kActivations);
    product<T>(c, random);
  }
}

// The sizes where blocks and threads change, with the paths that they take.
template <class T>
void chosen_products(Random& random) {
  const Operand plain = Operand::contiguous;
  const auto run = [&](int64_t m, int64_t n, int64_t k, bool at, bool bt, Operand a, Operand b) {
    if (quick && !std::is_same_v<T, float> && random.chance(0.7)) return;
    for (bool epilogue : {false, true})
      product<T>({.m = m,
                  .n = n,
                  .k = k,
                  .a = a,
                  .b = b,
                  .a_transposed = at,
                  .b_transposed = bt,
                  .bias = epilogue,
                  .preactivation = epilogue,
                  .activation = epilogue ? Activation::gelu : Activation::none},
                 random);
  };
  run(350, 41, 60, false, true, plain, plain);   // several blocks of M
  run(37, 4200, 33, false, true, plain, plain);  // several blocks of N
  run(40, 50, 2000, false, true, plain, plain);  // several blocks of K
  run(40, 50, 2000, true, false, plain, Operand::padded);
  run(35, 4100, 400, false, true, Operand::strided, plain);  // several of N and K: partial sums beside each other
  run(600, 10, 784, false, true, plain, plain);              // few columns
  run(3, 1000, 300, false, true, plain, plain);              // few rows
  run(8, 3000, 1100, false, true, plain, Operand::collapsed);
  run(10, 784, 600, true, false, plain, plain);   // the weight's gradient of a small layer
  run(1500, 70, 10, false, false, plain, plain);  // the input's gradient of a small layer
  run(33, 33, 5000, true, true, plain, plain);
  run(33, 20, 9000, true, false, plain, Operand::padded);  // K in parts for the threads
  run(5, 12, 17000, false, true, plain, plain);
  for (const int64_t k : {1, 2, 31, 32, 33, 300})  // one output of a table by columns
    run(2100, 1, k, false, true, Operand::column_major, plain);
}

// A block reads its operands' NaN and infinities as they are, and nothing of them where it pads.
template <class T>
void special_values(int64_t m, int64_t n, int64_t k) {
  Random random(12);
  for (bool b_transposed : {false, true}) {
    describe("gemm %s %lld %lld %lld: NaN stays in its row", Format<T>::name, (long long)m, (long long)n, (long long)k);
    const int64_t bad = m - 1;
    int64_t at = 0;
    Matrix<T> a(Operand::contiguous, m, k, Guard::behind, [&] { return at++ == bad * k + k / 2 ? kNaN : 0.5; });
    Matrix<T> b(Operand::contiguous, b_transposed ? n : k, b_transposed ? k : n, Guard::behind, [] { return 1.0; });
    Buffer<T> y(m * n);
    rf::GemmProblem g = {.m = m,
                         .n = n,
                         .k = k,
                         .a = a.view,
                         .a_transposed = false,
                         .b = b.view,
                         .b_transposed = b_transposed,
                         .c = y.data(),
                         .c_stride = n};
    for (Activation activation : {Activation::none, Activation::relu}) {
      g.activation = activation;
      rf::gemm(Format<T>::dtype, g);
      bool right = true;
      for (int64_t i = 0; i < m * n; ++i)
        right = right && (i / n == bad ? std::isnan(y.value(i)) : y.value(i) == 0.5 * (double)k);
      CHECK(right);
    }
  }
}

template <class T>
void any_number_of_threads() {
  const Call calls[] = {{.m = 70,
                         .n = 90,
                         .k = 900,
                         .a = Operand::contiguous,
                         .b = Operand::contiguous,
                         .a_transposed = false,
                         .b_transposed = true,
                         .bias = true,
                         .preactivation = false,
                         .activation = Activation::none},
                        {.m = 500,
                         .n = 10,
                         .k = 700,
                         .a = Operand::contiguous,
                         .b = Operand::contiguous,
                         .a_transposed = false,
                         .b_transposed = true,
                         .bias = true,
                         .preactivation = false,
                         .activation = Activation::none},
                        {.m = 10,
                         .n = 500,
                         .k = 700,
                         .a = Operand::contiguous,
                         .b = Operand::contiguous,
                         .a_transposed = true,
                         .b_transposed = false,
                         .bias = false,
                         .preactivation = false,
                         .activation = Activation::none},
                        {.m = 20,
                         .n = 30,
                         .k = 9000,
                         .a = Operand::contiguous,
                         .b = Operand::contiguous,
                         .a_transposed = true,
                         .b_transposed = false,
                         .bias = true,
                         .preactivation = false,
                         .activation = Activation::relu}};
  for (const Call& c : calls) {
    std::vector<T> first;
    for (int64_t n : {1, 2, 3, 4}) {
      if (quick && n % 2 == 0) continue;
      threads = n;
      Random random(11);  // the same operands each time
      std::vector<T> y;
      product<T>(c, random, &y);
      if (first.empty()) first = y;
      CHECK(!std::memcmp(first.data(), y.data(), y.size() * sizeof(T)));
    }
    threads = 2;
  }
}

template <class T>
void all() {
  Random random(1300 + (int)Format<T>::dtype);
  random_products<T>(fewer(250), random);
  chosen_products<T>(random);
  special_values<T>(40, 40, 40);
  special_values<T>(5, 50, 20);
  special_values<T>(50, 5, 20);
  any_number_of_threads<T>();
}

}  // namespace

TEST(gemm) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  describe("gemm: paths");
  const char* only = std::getenv("DTYPE");
  for (int64_t runs : runs_of_path) CHECK(runs > 0 || (only && *only));  // pairs of bf16 take fewer
  CHECK(rf::kernels().fma_gflops(1e-3) > 0);
}

}  // namespace test
