// The CUDA cross-entropy where formulas end, with classes out of range, and its total in every type.
#include <limits>
#include <utility>

#include "cross_entropy_cuda.h"
#include "cross_entropy_edge_cases.h"

namespace test {
namespace {

// The assertion comes before any access: out of bounds would be another kind of fault.
template <class T>
void classes_out_of_range() {
  for (int64_t wrong : {int64_t(10), int64_t(-1), int64_t(1) << 62, std::numeric_limits<int64_t>::min()})
    for (int64_t at : {int64_t(0), int64_t(6)}) {
      describe("cross_entropy %s: class %lld at row %lld", Format<T>::name, (long long)wrong, (long long)at);
      Simple<Cuda, T> s(7, 10, at == 0);
      s.fill([](int64_t i) { return (double)(i % 3); });
      s.target[at] = wrong;
      bool asserted = false;
      try {
        s.forward();
      } catch (const cuda_on_host::Fault& fault) {
        asserted = fault.kind == cuda_on_host::Kind::assertion;
      }
      CHECK(asserted);
    }
}

template <class T>
void edges() {
  for (const bool plain : {false, true}) {
    for (const int64_t classes : {2, 33, 1100}) {
      infinite_and_nan_logits<Cuda, T>(classes, classes / 2, plain);
      largest_numbers<Cuda, T>(classes, plain);
    }
    nothing_but_minus_infinity<Cuda, T>(37, plain);
    ignored_rows<Cuda, T>(9, 37, plain);
    huge_logits<Cuda, T>(plain);
  }
  many_rows<Cuda, T>(1500);
}

void total_in_every_type() {
  describe("cross_entropy: the total in every type");
  const auto total_of = [](auto zero) {
    using R = decltype(zero);
    Buffer<float> x = filled<float>(6, [] { return 0.0; });
    Buffer<int64_t> target = filled<int64_t>(3, [] { return 1.0; });
    Buffer<float> loss(3), max(3), log_sum(3);
    Buffer<R> total(1);
    Buffer<char> workspace(rf::cuda::cross_entropy_workspace(3));
    rf::cuda::CrossEntropyRows a = {};
    a.rows = 3;
    a.classes = 2;
    a.logits = x.data();
    a.layout = {1, 2, 0, 1};
    a.target = target.data();
    a.logit_scale = 1;
    a.row_max = max.data();
    a.row_log_sum = log_sum.data();
    rf::cuda::CrossEntropyResults out = {};
    out.loss = loss.data();
    out.total = total.data();
    out.total_dtype = Format<R>::dtype;
    out.workspace = workspace.data();
    const Lent lent[] = {
        Lent(std::as_const(x)), Lent(std::as_const(target)), Lent(loss), Lent(max), Lent(log_sum), Lent(total),
        Lent(workspace)};
    rf::cuda::launch_cross_entropy_forward(rf::DType::f32, a, out, nullptr);
    return total.value(0);
  };
  const double exact = 3 * std::log(2.0);
  CHECK(std::fabs(total_of(0.0) - exact) < 1e-6);
  CHECK(std::fabs(total_of(0.0f) - exact) < 1e-6);
  CHECK(total_of(bf16{}) == rounded<bf16>(exact));
  CHECK(total_of(f16{}) == rounded<f16>(exact));
}

}  // namespace

TEST(cross_entropy_edges) {
  each_dtype([](auto element) { edges<decltype(element)>(); });
  classes_out_of_range<float>();
  total_in_every_type();
}

}  // namespace test
