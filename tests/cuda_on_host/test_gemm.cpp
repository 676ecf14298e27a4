// The matrix product through launch_gemm: every kernel, every arrangement of the operands, tails, split K, epilogues.
#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "cuda/device/launch_kernel.cuh"
#include "cuda/gemm.h"
#include "cuda/tuning.h"
#include "device_memory.h"
#include "gemm_reference.h"

namespace test {
namespace {

using rf::cuda::GemmLoad;
using rf::cuda::GemmPlan;

// aligned has rows padded to 16 bytes, which contiguous ones may be by chance; expanded repeats its first row.
enum class Layout { aligned, contiguous, column_major, aligned_columns, strided, collapsed, expanded };
constexpr Layout kLayouts[] = {Layout::aligned, Layout::contiguous, Layout::column_major, Layout::aligned_columns,
                               Layout::strided, Layout::collapsed,  Layout::expanded};
constexpr const char* kLayoutNames[] = {"aligned", "contiguous", "column_major", "aligned_columns",
                                        "strided", "collapsed",  "expanded"};

template <class T>
rf::MatrixView arrange(Layout layout, int64_t rows, int64_t columns) {
  const auto padded = [](int64_t n) { return (n + 16) / 16 * 16; };
  switch (layout) {
    case Layout::aligned:
      return {nullptr, 1, padded(columns), 0, 1};
    case Layout::contiguous:
      return {nullptr, 1, columns, 0, 1};
    case Layout::column_major:
      return {nullptr, 1, 1, 0, rows + 1};
    case Layout::aligned_columns:
      return {nullptr, 1, 1, 0, padded(rows)};
    case Layout::strided:
      return {nullptr, 1, 2 * columns + 1, 0, 2};
    case Layout::collapsed:
      return {nullptr, 4, 4 * columns + 7, columns + 1, 1};
    case Layout::expanded:
      return {nullptr, 1, 0, 0, 1};
  }
  return {};
}

template <class T>
struct Matrix {
  rf::MatrixView view;
  Buffer<T> memory;
  Lent lent;

  template <class F>
  Matrix(Layout layout, int64_t rows, int64_t columns, F&& generate)
      : view(arrange<T>(layout, rows, columns)),
        memory(input<T>(elements(rows, columns), generate, aligned(layout) ? Guard::before : Guard::behind)),
        lent(static_cast<const Buffer<T>&>(memory)) {
    view.data = memory.data();
  }
  double value(int64_t r, int64_t c) const { return memory.value(view.row_offset(r) + c * view.col_stride); }

 private:
  static bool aligned(Layout l) { return l == Layout::aligned || l == Layout::aligned_columns; }
  int64_t elements(int64_t rows, int64_t columns) const {
    if (rows == 0 || columns == 0) return 0;
    int64_t last = 0;
    for (int64_t r = 0; r < rows; ++r) last = std::max(last, view.row_offset(r));
    return last + (columns - 1) * view.col_stride + 1;
  }
};

struct Call {
  int64_t m, n, k;
  Layout a = Layout::aligned, b = Layout::aligned;
  bool a_transposed = false, b_transposed = false, bias = false, preactivation = false;
  Activation activation = Activation::none;
  bool tf32 = false, hopper = false;  // hopper: by gemm_sm90, else as launch_gemm decides
  bool by_engine = false;             // its results
};

// To 11 significant bits, ties away from zero, as operands become tf32.
double rounded_to_tf32(double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int e = std::ilogb(x) - 10;
  return std::ldexp(std::round(std::ldexp(x, -e)), e);
}

std::set<std::string> kernels_run;

template <class T>
void product(const Call& c, Random& random) {
  const bool tf32 = c.tf32 && std::is_same_v<T, float>;
  const auto value = [&] { return random.spiky() / 2; };
  Matrix<T> a(c.a, c.a_transposed ? c.k : c.m, c.a_transposed ? c.m : c.k, value);
  Matrix<T> b(c.b, c.b_transposed ? c.n : c.k, c.b_transposed ? c.k : c.n, value);
  const Buffer<T> bias = input<T>(c.n, value, Guard::behind);
  // Rows of results that the copy engine can write, and others.
  const bool plain = c.hopper ? c.by_engine : random.chance(0.5);
  const int64_t stride = plain ? (c.n + 7) / 8 * 8 : c.n + random.integer(0, 2);
  const int64_t size = (c.m - 1) * stride + c.n, shift = plain ? 0 : random.integer(c.hopper ? 1 : 0, 3);
  Buffer<T> y(size, Guard::before, shift), z(size, Guard::before, shift);

  rf::cuda::Gemm g = {{.m = c.m,
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
                       .preactivation = c.preactivation ? z.data() : nullptr},
                      nullptr};
  const rf::DType dtype = Format<T>::dtype;
  const GemmPlan plan = rf::cuda::gemm_plan(dtype, c.tf32, g);
  const rf::cuda::GemmTask task = rf::cuda::gemm_task(g);
  // Its first contents are NaN bits: a sum that is read before it is written would show.
  Buffer<char> workspace(rf::cuda::gemm_workspace(dtype, c.tf32, g));
  g.workspace = workspace.data();
  const With with(g);
  char name[80];
  if (c.hopper)
    std::snprintf(name, sizeof name, "%s sm90 %d %d %s", Format<T>::name, task.a.across_k, task.b.across_k,
                  c.by_engine ? "results by the engine" : "results by lanes");
  else
    std::snprintf(name, sizeof name, "%s%s tile %d load %d %s", Format<T>::name, tf32 ? " tf32" : "", plan.tile_m,
                  plan.tensor_cores ? (int)plan.load : -1, plan.splits > 1 ? "split" : "whole");
  kernels_run.insert(name);
  describe("gemm %s m=%lld n=%lld k=%lld a=%s%s b=%s%s bias=%d pre=%d %s: %s", Format<T>::name, (long long)c.m,
           (long long)c.n, (long long)c.k, kLayoutNames[(int)c.a], c.a_transposed ? "^T" : "", kLayoutNames[(int)c.b],
           c.b_transposed ? "^T" : "", c.bias, c.preactivation, name_of(c.activation), name);
  const int64_t stored = cuda_on_host::boxes_stored();
  {
    Lent lent_bias(bias), lent_workspace(workspace), lent_y(y), lent_z(z);
    if (!c.hopper)
      rf::cuda::launch_gemm(dtype, c.tf32, g, nullptr);
    else if (!CHECK(rf::cuda::launch_gemm_sm90(dtype, task, nullptr)))
      return;
    CHECK((cuda_on_host::boxes_stored() > stored) == c.by_engine);
  }

  check_product(g, y, z, [&](double x) { return tf32 ? rounded_to_tf32(x) : x; });
}

template <class T>
void random_products(int count, Random& random, bool tf32) {
  constexpr int64_t kExtents[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 32, 33, 40, 63, 64, 65, 72, 100};
  constexpr int64_t kDepths[] = {0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 130};
  for (int i = 0; i < count; ++i) {
    Call c = {};
    c.m = random.pick(kExtents);
    c.n = random.pick(kExtents);
    c.k = random.pick(kDepths);
    const auto layout = [&] { return random.chance(0.3) ? Layout::aligned : random.pick(kLayouts); };
    c.a = layout();
    c.b = layout();
    c.a_transposed = random.chance(0.4);
    c.b_transposed = random.chance(0.5);
    c.bias = random.chance(0.5);
    c.preactivation = random.chance(0.3);
    c.activation = random.chance(0.4) ? Activation::none : random.pick(kActivations);
    c.tf32 = tf32;
    product<T>(c, random);
  }
}

// Each kernel by name: operands along and across K, tiles of both sizes with ragged edges, K whole and split.
template <class T>
void chosen_products(Random& random, bool tf32) {
  // Two parts of K and a ragged end, whatever the stages' depth.
  namespace tuning = rf::cuda::tuning;
  const bool tensor_cores = tf32 || sizeof(T) == 2;
  const int64_t depth = tensor_cores ? tuning::kGemmDepthBytes / (int64_t)sizeof(T) : tuning::SimtSmall::Depth;
  const int64_t deep = 2 * tuning::kGemmLeastStages * depth + 5;
  for (bool split : {false, true})
    for (bool large : {false, true}) {
      if (large && std::is_same_v<T, double>) continue;  // has small tiles only
      // Large tiles are taken if they fill the three SMs of the emulated device; four of them leave nothing to split.
      const int64_t m = large && !split ? 200 : large ? 100 : 50, n = large ? 150 : 70, k = split ? deep : 75;
      const auto run = [&](Layout a, bool a_transposed, bool b_transposed, bool epilogue) {
        product<T>({.m = m,
                    .n = n,
                    .k = k,
                    .a = a,
                    .a_transposed = a_transposed,
                    .b_transposed = b_transposed,
                    .bias = epilogue,
                    .preactivation = epilogue,
                    .activation = epilogue ? Activation::gelu : Activation::none,
                    .tf32 = tf32},
                   random);
      };
      run(Layout::aligned, false, true, true);
      if (tensor_cores) run(Layout::aligned, false, false, false);
      if (tensor_cores) run(Layout::aligned, true, false, true);
      if (!large) run(Layout::strided, false, true, true);
    }
}

// Every activation behind every kind of product, and every way that operands may be transposed, copied and gathered.
template <class T>
void every_choice(Random& random, bool tf32) {
  for (Activation activation : kActivations)
    for (bool preactivation : {false, true})
      product<T>({.m = 17,
                  .n = 41,
                  .k = 33,
                  .b_transposed = true,
                  .bias = true,
                  .preactivation = preactivation,
                  .activation = activation,
                  .tf32 = tf32},
                 random);
  for (Layout layout : {Layout::aligned, Layout::contiguous})
    for (bool a_transposed : {false, true})
      for (bool b_transposed : {false, true})
        product<T>({.m = 19,
                    .n = 43,
                    .k = 37,
                    .a = layout,
                    .b = layout,
                    .a_transposed = a_transposed,
                    .b_transposed = b_transposed,
                    .tf32 = tf32},
                   random);
}

// A block reads its operands' NaN as they are, and nothing of them where it pads.
template <class T>
void special_values(bool tf32, bool hopper = false) {
  for (bool b_transposed : {false, true})
    for (Layout layout : {Layout::aligned, Layout::contiguous}) {
      if (hopper && layout != Layout::aligned) continue;
      constexpr int64_t m = 21, n = 37, k = 45, bad = 9;
      describe("gemm %s: NaN stays in its row", Format<T>::name);
      const int64_t at = arrange<T>(layout, m, k).row_offset(bad) + 20;
      int64_t i = 0;
      Matrix<T> a(layout, m, k, [&] { return i++ == at ? kNaN : 0.5; });
      Matrix<T> b(layout, b_transposed ? n : k, b_transposed ? k : n, [] { return 1.0; });
      Buffer<T> y(m * n);
      rf::cuda::Gemm g = {};
      g.m = m;
      g.n = n;
      g.k = k;
      g.a = a.view;
      g.b = b.view;
      g.b_transposed = b_transposed;
      g.c = y.data();
      g.c_stride = n;
      g.activation = Activation::relu;
      {
        Lent lent(y);
        if (hopper)
          CHECK(rf::cuda::launch_gemm_sm90(Format<T>::dtype, rf::cuda::gemm_task(g), nullptr));
        else
          rf::cuda::launch_gemm(Format<T>::dtype, tf32, g, nullptr);
      }
      bool right = true;
      for (int64_t j = 0; j < m * n; ++j)
        right = right && (j / n == bad ? std::isnan(y.value(j)) : y.value(j) == 0.5 * (double)k);
      CHECK(right);
    }
}

template <class T>
void all(bool tf32) {
  Random random(1700 + (int)Format<T>::dtype + (tf32 ? 10 : 0));
  random_products<T>(12, random, tf32);
  chosen_products<T>(random, tf32);
  every_choice<T>(random, tf32);
  special_values<T>(tf32);
}

// ---- Hopper's kernel -----------------------------------------------------------------------------------------------

// Tiles are 128 x 256 and 64 of K deep, with four stages; a block of the three that the emulated device has takes one
// tile after another, and the stages go on from one to the next.
template <class T>
void hopper_products(Random& random) {
  const auto run = [&](int64_t m, int64_t n, int64_t k, Layout a, Layout b, bool a_transposed, bool b_transposed,
                       bool epilogue, bool by_engine) {
    const Activation activation = epilogue ? random.pick(kActivations) : Activation::none;
    product<T>({.m = m,
                .n = n,
                .k = k,
                .a = a,
                .b = b,
                .a_transposed = a_transposed,
                .b_transposed = b_transposed,
                .bias = epilogue,
                .preactivation = epilogue && random.chance(0.5),
                .activation = activation,
                .hopper = true,
                .by_engine = by_engine},
               random);
  };
  for (Layout a : {Layout::aligned, Layout::aligned_columns})
    for (Layout b : {Layout::aligned, Layout::aligned_columns})
      for (bool a_transposed : {false, true})
        for (bool b_transposed : {false, true}) run(37, 51, 75, a, b, a_transposed, b_transposed, false, a != b);
  for (bool a_transposed : {false, true})
    for (bool b_transposed : {false, true})
      for (bool by_engine : {false, true})
        run(200, 300, 330, Layout::aligned, Layout::aligned, a_transposed, b_transposed, true, by_engine);
  struct Size {
    int64_t m, n, k;
  };
  // Whole tiles; less than a tile of each; one more than a tile of each; more rows of tiles than are taken in a group.
  for (const Size s :
       {Size{128, 256, 64}, Size{2, 2, 2}, Size{9, 7, 3}, Size{129, 257, 65}, Size{63, 8, 300}, Size{1100, 17, 9}})
    run(s.m, s.n, s.k, Layout::aligned, Layout::aligned, random.chance(0.5), random.chance(0.5), true,
        random.chance(0.7));
  // An odd number of boxes in each tile, so that the next one goes on with the other.
  run(1100, 17, 9, Layout::aligned, Layout::aligned, false, true, false, true);
}

// What the copy engine cannot be told of stays with the other kernels.
template <class T>
void hopper_refusals() {
  const auto taken = [](Layout layout, int64_t m, int64_t n, int64_t k, int64_t shift, rf::DType dtype) {
    const Matrix<T> a(layout, m, k + shift, [] { return 1.0; }), b(Layout::aligned, k, n, [] { return 1.0; });
    rf::cuda::Gemm g = {};
    g.m = m;
    g.n = n;
    g.k = k;
    g.a = a.view;
    g.a.data = (const T*)g.a.data + shift;
    g.b = b.view;
    Buffer<T> y(m * n);
    const Lent lent(y);
    g.c = y.data();
    g.c_stride = n;
    return rf::cuda::launch_gemm_sm90(dtype, rf::cuda::gemm_task(g), nullptr);
  };
  describe("gemm_sm90: operands that it takes, and that it leaves");
  const rf::DType own = Format<T>::dtype;
  CHECK(taken(Layout::aligned, 5, 6, 7, 0, own));
  CHECK(taken(Layout::contiguous, 5, 6, 8, 0, own));
  CHECK(!taken(Layout::contiguous, 5, 6, 7, 0, own));
  CHECK(!taken(Layout::aligned, 5, 6, 7, 1, own));
  CHECK(!taken(Layout::strided, 5, 6, 7, 0, own));
  CHECK(!taken(Layout::collapsed, 5, 6, 7, 0, own));
  CHECK(!taken(Layout::expanded, 5, 6, 7, 0, own));
  CHECK(!taken(Layout::aligned, 5, 6, 0, 0, own));
  CHECK(!taken(Layout::aligned, 1, 6, 7, 0, own));  // one row of memory, whose stride may be anything
  CHECK(!taken(Layout::aligned, 5, 6, 7, 0, rf::DType::f32));
}

template <class T>
void all_of_hopper(int seed) {
  Random random(seed);
  hopper_products<T>(random);
  special_values<T>(false, true);
  hopper_refusals<T>();
}

}  // namespace

TEST(gemm) {
  if (rf::cuda::device().arch != 80) return;  // what is launched does not depend on the architecture
  all<float>(false);
  all<float>(true);
  all<double>(false);
  all<bf16>(false);
  all<f16>(false);
  describe("gemm: kernels run");
  // Tensor cores: three types, whole and split; three ways to copy in two tiles, single elements in one. Without them:
  // float32 in two tiles, float64 in one.
  CHECK(kernels_run.size() == 3 * 2 * (3 * 2 + 1) + 2 * (2 + 1));
}

TEST(gemm_sm90) {
  if (rf::cuda::device().arch != 90) {
    describe("gemm_sm90 on another device");
    rf::cuda::Gemm g = {};
    g.m = g.n = g.k = 8;
    CHECK(!rf::cuda::launch_gemm_sm90(rf::DType::bf16, rf::cuda::gemm_task(g), nullptr));
    return;
  }
  kernels_run.clear();
  all_of_hopper<bf16>(90);
  all_of_hopper<f16>(91);
  describe("gemm_sm90: kernels run");
  CHECK(kernels_run.size() == 2 * 4 * 2);  // two types, operands along and across K, results by either
}

}  // namespace test
