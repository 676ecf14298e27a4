// The CPU's cross-entropy where formulas end, with classes out of range, every alignment of streaming stores and any
// number of threads. And the reference itself, against finite differences.
#include <limits>
#include <vector>

#include "cross_entropy_cpu.h"
#include "cross_entropy_edge_cases.h"

namespace test {
namespace {

void reference_against_differences() {
  describe("the reference's gradient against finite differences");
  Random random(4);
  for (int i = 0; i < 50; ++i) {
    Options o;
    o.smoothing = i & 1 ? 0.1 : 0;
    o.z_loss = i & 2 ? 0.05 : 0;
    o.softcap = i & 4 ? 5 : 0;
    o.logit_scale = i & 8 ? 0.7 : 1;
    Row r;
    for (int j = 0; j < 5; ++j) {
      r.x.push_back(3 * random.spiky());
      r.w.push_back(random.between(0.3, 2));
      r.t.push_back(random.uniform());
    }
    if (i & 16) {
      r.target = 2;
      r.t = {0, 0, 1, 0, 0};
    }
    const Upstream up = {random.spiky(), random.spiky(), random.spiky(), random.spiky()};
    const auto value = [&](const Row& at) {
      const Result f = cross_entropy_row(at, o);
      return up.loss * f.loss + up.lse * f.lse + up.entropy * f.entropy + up.logprob * f.logprob;
    };
    const Gradient g = cross_entropy_gradient(r, o, cross_entropy_row(r, o), up);
    for (size_t j = 0; j < 5; ++j) {
      constexpr double h = 1e-5;
      const auto difference = [&](std::vector<double> Row::* member) {
        Row above = r, below = r;
        (above.*member)[j] += h;
        (below.*member)[j] -= h;
        return (value(above) - value(below)) / (2 * h);
      };
      CHECK(std::fabs(difference(&Row::x) - g.x[j]) < 1e-7 * (1 + std::fabs(g.x[j])) * 10);
      if (r.target < 0) CHECK(std::fabs(difference(&Row::t) - g.t[j]) < 1e-7 * (1 + std::fabs(g.t[j])) * 10);
    }
  }
}

template <class T>
void classes_out_of_range() {
  describe("cross_entropy %s: classes out of range", Format<T>::name);
  constexpr int64_t rows = 5000, classes = 10;
  for (int64_t wrong : {classes, int64_t(-1), int64_t(1) << 62, std::numeric_limits<int64_t>::min()})
    for (int64_t at : {int64_t(0), int64_t(1500), rows - 1}) {
      Simple<Cpu, T> s(rows, classes, false);
      s.fill([](int64_t i) { return (double)(i % 3); });
      s.target[at] = wrong;
      s.target[rows - 1] = wrong;
      s.forward();
      CHECK(s.sums.bad_row == at);
    }
}

// Non-temporal stores want alignment, which rows do not have.
template <class T>
void streaming() {
  Random random(5);
  for (int64_t classes : {1, 3, 16, 17, 40, 100})
    for (int64_t shift = 0; shift < 64 / (int64_t)sizeof(T); ++shift)
      for (Guard guard : {Guard::behind, Guard::before}) {
        describe("cross_entropy %s: streaming %lld classes, shifted by %lld", Format<T>::name, (long long)classes,
                 (long long)shift);
        Simple<Cpu, T> s(3, classes, random.chance(0.5));
        s.fill([&](int64_t) { return random.spiky(); });
        s.forward();
        Rows<T> streamed(s.shape, Arrangement::rows, guard, shift);
        s.backward();
        s.backward(streamed, 0, Through::loss, true);
        bool same = true;
        for (int64_t r = 0; r < 3; ++r)
          for (int64_t j = 0; j < classes; ++j) same = same && s.dx.value(r, j) == streamed.result(r, j);
        CHECK(same);
        CHECK(streamed.memory.rest_untouched());
      }
}

template <class T>
void any_number_of_threads() {
  describe("cross_entropy %s: the same bits with any number of threads", Format<T>::name);
  Random random(6);
  for (int64_t classes : {10, 37}) {
    Simple<Cpu, T> s(5000, classes, true);
    s.fill([&](int64_t) { return random.spiky(); });
    std::vector<double> sums;
    for (int64_t n : {1, 2, 3, 5}) {
      threads = n;
      s.forward();
      sums.push_back(*s.sums.loss);
    }
    threads = 2;
    for (double sum : sums) CHECK(sum == sums[0]);
  }
}

template <class T>
void all() {
  for (bool plain : {false, true}) {
    for (int64_t classes : {2, 9, 16, 33, 2100, 4500}) {
      for (int64_t at : {int64_t(0), classes / 2, classes - 1}) infinite_and_nan_logits<Cpu, T>(classes, at, plain);
      largest_numbers<Cpu, T>(classes, plain);
    }
    for (int64_t classes : {10, 37}) {
      nothing_but_minus_infinity<Cpu, T>(classes, plain);
      ignored_rows<Cpu, T>(70, classes, plain);
    }
    huge_logits<Cpu, T>(plain);
  }
  for (int64_t rows : {1000, 65535, 300000}) many_rows<Cpu, T>(rows);
  classes_out_of_range<T>();
  streaming<T>();
  any_number_of_threads<T>();
}

}  // namespace

TEST(cross_entropy_edges) {
  reference_against_differences();
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
