// The CUDA cross-entropy over random combinations of its options, arrangements in memory, sizes and upstream gradients,
// against double precision: forward, backward, and both from one read.
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "cross_entropy_reference.h"
#include "cuda/launch.h"
#include "device_memory.h"
#include "layouts.h"

namespace test {
namespace {

using rf::cuda::CrossEntropyResults;
using rf::cuda::CrossEntropyRows;
using rf::cuda::CrossEntropyUpstream;

constexpr int64_t kRowClasses[] = {1, 2, 7, 9, 16, 33, 129, 300, 1030, 2051};

enum class Pass { separate, one };  // backward after forward, or both from one read
enum class Reduction { none, mean, sum };

// Which gradients and outputs a call asks for, and how they lie.
struct Call {
  RowShape shape;
  Arrangement logits, probabilities, grad, grad_t;
  Pass pass;
  Reduction reduction;
  bool in_place, want_dx, want_dt, loss, lse, entropy, logprob, argmax;
};

template <class T>
class Problem {
  using A = rf::acc_t<T>;

 public:
  Problem(const Call& call, const Options& options, Random& random)
      : c(call),
        o(options),
        guard(random.chance(0.7) ? Guard::behind : Guard::before),
        rows(call.shape.rows()),
        shift(random.integer(0, 7)),
        x(c.shape, c.logits, guard, shift, [&] { return 3 * random.spiky(); }),
        dx(c.shape, c.grad, guard, random.chance(0.5) ? shift : 0),
        w(c.shape.classes, guard),
        w_sum(1, guard),
        target(rows, guard),
        max(rows, guard),
        log_sum(rows, guard),
        entropy(rows, guard),
        mass(rows, guard),
        target_mass(rows, guard),
        weight_sum(1, guard) {
    double sum = 0;
    for (int64_t j = 0; j < w.count(); ++j) {
      w[j] = (A)(random.chance(0.1) ? 0 : random.between(0.2, 2));
      sum += w.value(j);
    }
    w_sum[0] = (A)sum;
    for (int64_t r = 0; r < rows; ++r)
      target[r] = random.chance(0.2) ? o.ignore_index : random.integer(0, c.shape.classes - 1);
    if (c.reduction == Reduction::mean && !o.probabilities) make_mean_finite();
    if (o.probabilities) {
      const double scale = 2.0 / (double)c.shape.classes;
      t.emplace(c.shape, c.probabilities, guard, 0, [&] { return random.chance(0.2) ? 0 : scale * random.uniform(); });
      dt.emplace(c.shape, c.grad_t, guard, shift);
    }
    for (int64_t r = 0; r < rows; ++r) inputs.push_back(row(r));
    for (const Row& r : inputs) results.push_back(cross_entropy_row(r, o));
    for (const Result& r : results) denominator += r.denominator;
  }

  void run(Random& random) {
    if (c.pass == Pass::one)
      forward_backward();
    else {
      forward();
      backward(random);
    }
  }

 private:
  CrossEntropyRows arguments() {
    CrossEntropyRows a = {};
    a.rows = rows;
    a.classes = c.shape.classes;
    a.logits = x.memory.data();
    a.layout = x.layout;
    a.target = o.probabilities ? nullptr : target.data();
    if (t) {
      a.probabilities = t->memory.data();
      a.probability_layout = t->layout;
    }
    a.class_weight = o.weighted ? w.data() : nullptr;
    a.class_weight_sum = o.weighted ? w_sum.data() : nullptr;
    a.ignore_index = o.ignore_index;
    a.label_smoothing = o.smoothing;
    a.z_loss = o.z_loss;
    a.softcap = o.softcap;
    a.logit_scale = o.logit_scale;
    a.row_max = max.data();
    a.row_log_sum = log_sum.data();
    a.row_entropy = c.entropy ? entropy.data() : nullptr;
    a.row_mass = t ? mass.data() : nullptr;
    a.row_target_mass = t ? target_mass.data() : nullptr;
    return a;
  }

  // A row that counts, of a class that weighs something.
  void make_mean_finite() {
    target[0] = o.ignore_index == 0 ? c.shape.classes - 1 : 0;
    w_sum[0] += (A)1 - w[target[0]];
    w[target[0]] = 1;
  }

  Row row(int64_t r) const {
    Row v;
    v.x = x.row(r);
    v.w.assign(c.shape.classes, 1.0);
    if (o.weighted)
      for (int64_t j = 0; j < w.count(); ++j) v.w[j] = w.value(j);
    if (t) {
      v.t = t->row(r);
    } else {
      v.t.assign(c.shape.classes, 0.0);
      v.ignored = target.data()[r] == o.ignore_index;
      v.target = target.data()[r];
      if (!v.ignored) v.t[v.target] = 1;
    }
    return v;
  }

  // What is read and, in `written`, what is written by both forward launchers.
  struct Memory {
    std::vector<std::unique_ptr<Lent>> lent;
    template <class B>
    void lend(B& buffer) {
      lent.emplace_back(new Lent(buffer));
    }
  };
  void lend_inputs(Memory& m, bool logits) {
    if (logits) m.lend(std::as_const(x.memory));
    if (t) m.lend(std::as_const(t->memory));
    m.lend(std::as_const(w));
    m.lend(std::as_const(w_sum));
    m.lend(std::as_const(target));
  }
  template <class B>
  static void* pointer(B& buffer, bool wanted) {
    return wanted ? buffer.data() : nullptr;
  }

  void forward() {
    results_of([&](const CrossEntropyRows& a, const CrossEntropyResults& out) {
      rf::cuda::launch_cross_entropy_forward(Format<T>::dtype, a, out, nullptr);
    });
  }

  void forward_backward() {
    const std::vector<T> before = x.memory.copy();
    Rows<T>& gradient = c.in_place ? x : dx;
    results_of([&](const CrossEntropyRows& a, const CrossEntropyResults& out) {
      std::optional<Lent> lent;
      if (!c.in_place) lent.emplace(dx.memory);
      rf::cuda::launch_cross_entropy_forward_backward(Format<T>::dtype, a, out, gradient.memory.data(), gradient.layout,
                                                      nullptr);
    });
    {
      Comparison<T> of_dx("dx");
      for (int64_t r = 0; r < rows; ++r) {
        const Gradient e = cross_entropy_gradient(inputs[r], o, results[r], {factor(1), 0, 0, 0});
        for (int64_t j = 0; j < c.shape.classes; ++j)
          of_dx.add(gradient.result(r, j), e.x[j], e.x_units[j], gradient.at(r, j));
      }
    }
    CHECK(c.in_place ? x.memory.rest_equals(before) : dx.memory.rest_untouched());

    // The same gradient is left alone by a backward pass of 1, and replaced by one of another factor.
    for (double upstream : {1.0, -2.0}) {
      if (c.in_place) break;
      const std::vector<T> first = dx.memory.copy();
      Buffer<A> g = filled<A>(1, [&] { return upstream; });
      CrossEntropyUpstream up = {};
      up.loss = g.data();
      up.weight_sum = c.reduction == Reduction::mean ? weight_sum.data() : nullptr;
      up.grad_logits = dx.memory.data();
      up.grad_layout = dx.layout;
      up.unless = 1;
      if (upstream == 1) {
        // Nothing but *loss is lent: nothing else may be touched.
        Lent of_g(std::as_const(g));
        rf::cuda::launch_cross_entropy_backward(Format<T>::dtype, arguments(), up, nullptr);
        continue;
      }
      Memory m;
      lend_inputs(m, true);
      for (auto* b : {&max, &log_sum, &mass, &target_mass}) m.lend(std::as_const(*b));
      m.lend(std::as_const(weight_sum));
      m.lend(std::as_const(g));
      m.lend(dx.memory);
      rf::cuda::launch_cross_entropy_backward(Format<T>::dtype, arguments(), up, nullptr);
      bool doubled = true;
      for (int64_t i = 0; i < dx.memory.count(); ++i) {
        const double a = to_double(first[i]), b = dx.memory.value(i);
        if (a == a) doubled = doubled && std::fabs(b + 2 * a) <= 0.01 * std::fabs(a) + 1e-6;
      }
      CHECK(doubled);
    }
  }

  // Runs a launcher that gives results and compares them.
  template <class F>
  void results_of(F&& launch) {
    const bool reduced = c.loss && c.reduction != Reduction::none;
    Buffer<A> loss(rows, guard), lse(rows, guard), logprob(rows, guard);
    Buffer<int64_t> argmax(rows, guard);
    Buffer<float> total(1, guard);
    Buffer<char> workspace(rf::cuda::cross_entropy_workspace(rows), guard);
    CrossEntropyResults out = {};
    out.loss = pointer(loss, c.loss);
    out.lse = pointer(lse, c.lse);
    out.logprob = pointer(logprob, c.logprob);
    out.argmax = c.argmax ? argmax.data() : nullptr;
    out.total = pointer(total, reduced);
    out.total_dtype = rf::DType::f32;
    out.mean = c.reduction == Reduction::mean;
    out.weight_sum = weight_sum.data();
    out.workspace = workspace.data();
    {
      Memory m;
      lend_inputs(m, !c.in_place);
      if (c.in_place) m.lend(x.memory);
      for (auto* b : {&loss, &lse, &logprob, &max, &log_sum, &entropy, &mass, &target_mass}) m.lend(*b);
      m.lend(argmax);
      m.lend(total);
      m.lend(weight_sum);
      m.lend(workspace);
      launch(arguments(), out);
    }
    Sum sum = 0;
    int64_t wrong_argmax = 0;
    double units = 0, size = 0;
    {
      Comparison<A> of_loss("loss"), of_lse("lse"), of_entropy("entropy"), of_logprob("logprob"), of_max("row_max"),
          of_log_sum("row_log_sum");
      for (int64_t r = 0; r < rows; ++r) {
        const Result& e = results[r];
        sum += e.loss;
        units += e.loss_units;
        size += std::fabs(e.loss);
        if (c.loss) of_loss.add(loss.result(r), e.loss, e.loss_units, r);
        if (c.logprob) of_logprob.add(logprob.result(r), e.logprob, e.logprob_units, r);
        // An ignored row of which nothing is asked is not read.
        const bool read = !inputs[r].ignored || c.lse || c.entropy || c.argmax;
        of_max.add(max.result(r), read ? e.max : 0, 2 * e.z_units, r);
        of_log_sum.add(log_sum.result(r), read ? e.log_sum : 0, 2 * e.lse_units, r);
        if (c.lse) of_lse.add(lse.result(r), e.lse, e.lse_units, r);
        if (c.entropy) of_entropy.add(entropy.result(r), e.entropy, e.entropy_units, r);
        if (c.argmax) {
          const int64_t i = (int64_t)argmax.result(r);
          // Exactly the first maximum where z is x itself; otherwise rounding may tie or swap neighbours.
          const bool right = e.z_units == 0
                                 ? i == e.argmax
                                 : i >= 0 && i < c.shape.classes && e.z[i] >= e.max - 4 * e.z_units * kUnit<T>;
          wrong_argmax += !right;
        }
        if (t) {
          mass.result(r);
          target_mass.result(r);
        }
      }
    }
    CHECK(wrong_argmax == 0);
    {
      Comparison<double> of_weight("denominator");
      of_weight.add(weight_sum.result(0), (double)denominator, long_sum_error(rows) * (double)denominator, 0);
      Comparison<float> of_total("total");
      const double by = c.reduction == Reduction::mean ? (double)denominator : 1;
      const double scale = kUnit<T> / kUnit<float>;
      if (reduced) of_total.add(total.result(0), (double)sum / by, ((units + 2 * size) * scale + size) / by, 0);
    }
    CHECK(loss.rest_untouched() && lse.rest_untouched() && logprob.rest_untouched() && argmax.rest_untouched());
    CHECK(max.rest_untouched() && log_sum.rest_untouched() && entropy.rest_untouched() && total.rest_untouched());
    CHECK(mass.rest_untouched() && target_mass.rest_untouched());
  }

  // What an upstream gradient of the loss is for each row.
  double factor(double upstream) const {
    return c.reduction == Reduction::mean ? upstream / weight_sum.value(0) : upstream;
  }

  void backward(Random& random) {
    const auto upstream = [&] { return input<A>(rows, [&] { return random.spiky(); }, guard); };
    const Buffer<A> g_loss = upstream(), g_lse = upstream(), g_entropy = upstream(), g_logprob = upstream();
    CrossEntropyUpstream g = {};
    g.loss = c.loss ? g_loss.data() : nullptr;
    g.loss_stride = c.reduction == Reduction::none ? 1 : 0;
    g.weight_sum = c.reduction == Reduction::mean ? weight_sum.data() : nullptr;
    g.lse = c.lse ? g_lse.data() : nullptr;
    g.entropy = c.entropy ? g_entropy.data() : nullptr;
    g.logprob = c.logprob ? g_logprob.data() : nullptr;
    Rows<T>& to = c.in_place ? x : dx;
    const bool want_dx = c.in_place || c.want_dx, want_dt = t && c.want_dt;
    if (want_dx) {
      g.grad_logits = to.memory.data();
      g.grad_layout = to.layout;
    }
    if (want_dt) {
      g.grad_probabilities = dt->memory.data();
      g.grad_probability_layout = dt->layout;
    }
    const std::vector<T> before = x.memory.copy();
    {
      Memory m;
      lend_inputs(m, !c.in_place);
      for (auto* b : {&g_loss, &g_lse, &g_entropy, &g_logprob}) m.lend(*b);
      for (auto* b : {&max, &log_sum, &entropy, &mass, &target_mass}) m.lend(std::as_const(*b));
      m.lend(std::as_const(weight_sum));
      m.lend(to.memory);
      if (dt) m.lend(dt->memory);
      rf::cuda::launch_cross_entropy_backward(Format<T>::dtype, arguments(), g, nullptr);
    }
    {
      Comparison<T> of_dx("dx"), of_dt("dt");
      for (int64_t r = 0; r < rows; ++r) {
        Upstream up;
        if (c.loss) up.loss = factor(g_loss.value(r * g.loss_stride));
        if (c.lse) up.lse = g_lse.value(r);
        if (c.entropy) up.entropy = g_entropy.value(r);
        if (c.logprob) up.logprob = g_logprob.value(r);
        const Gradient e = cross_entropy_gradient(inputs[r], o, results[r], up);
        for (int64_t j = 0; j < c.shape.classes; ++j) {
          if (want_dx) of_dx.add(to.result(r, j), e.x[j], e.x_units[j], to.at(r, j));
          if (want_dt) of_dt.add(dt->result(r, j), e.t[j], e.t_units[j], dt->at(r, j));
        }
      }
    }
    CHECK(x.memory.rest_equals(before));
    CHECK(dx.memory.rest_untouched() && (!dt || dt->memory.rest_untouched()));
  }

  const Call c;
  const Options o;
  const Guard guard;
  const int64_t rows, shift;
  Rows<T> x, dx;
  Buffer<A> w, w_sum;
  Buffer<int64_t> target;
  Buffer<A> max, log_sum, entropy, mass, target_mass;
  Buffer<double> weight_sum;
  std::optional<Rows<T>> t, dt;
  std::vector<Row> inputs;
  std::vector<Result> results;
  Sum denominator = 0;
};

// A plain call is that of an ordinary training step, which has a kernel of its own.
template <class T>
void random_call(const RowShape& shape, bool plain, Random& random) {
  const auto output = [&] { return kArrangements[random.integer(0, kOutputArrangements - 1)]; };
  Options o;
  Call c = {};
  c.shape = shape;
  c.pass = random.chance(0.4) ? Pass::one : Pass::separate;
  c.reduction = (Reduction)random.integer(c.pass == Pass::one ? 1 : 0, 2);
  o.weighted = random.chance(0.4);
  o.ignore_index = random.chance(0.5) || shape.classes == 1 ? -100 : shape.classes / 2;
  o.z_loss = random.chance(0.3) ? 0.01 : 0;
  c.in_place = random.chance(0.25);
  c.logits = random.chance(0.5) ? Arrangement::rows : output();
  c.lse = random.chance(0.3);
  c.logprob = random.chance(0.3);
  c.loss = c.want_dx = true;
  if (!plain) {
    o.probabilities = random.chance(0.35);
    o.smoothing = random.chance(0.4) ? 0.1 : 0;
    o.softcap = random.chance(0.3) ? 15 : 0;
    o.logit_scale = random.chance(0.3) ? 0.6 : 1;
    c.entropy = random.chance(0.3);
    c.argmax = random.chance(0.3);
    if (!c.in_place && random.chance(0.1)) c.logits = Arrangement::expanded;
    if (c.pass == Pass::separate) {
      c.want_dx = !o.probabilities || random.chance(0.8);
      c.want_dt = random.chance(0.7) || !c.want_dx;
      c.loss = random.chance(0.8);
    }
  }
  c.probabilities = random.chance(0.5) ? c.logits : kArrangements[random.integer(0, kOutputArrangements)];
  c.grad = random.chance(0.7) && c.logits != Arrangement::expanded ? c.logits : output();
  c.grad_t = random.chance(0.5) ? c.grad : output();
  describe(
      "cross_entropy %s outer=%lld inner=%lld classes=%lld %s%s%s prob=%d(%s) grad=%s,%s w=%d smooth=%d zloss=%d "
      "cap=%d scale=%d reduction=%d outputs=%d%d%d%d%d ignore=%lld",
      Format<T>::name, (long long)shape.outer, (long long)shape.inner, (long long)shape.classes,
      kArrangementNames[(int)c.logits], c.pass == Pass::one ? " one pass" : "", c.in_place ? " in place" : "",
      o.probabilities, kArrangementNames[(int)c.probabilities], kArrangementNames[(int)c.grad],
      kArrangementNames[(int)c.grad_t], o.weighted, o.smoothing != 0, o.z_loss != 0, o.softcap != 0, o.logit_scale != 1,
      (int)c.reduction, c.loss, c.lse, c.entropy, c.logprob, c.argmax, (long long)o.ignore_index);
  Problem<T>(c, o, random).run(random);
}

template <class T>
void random_calls() {
  Random random(300 + (int)Format<T>::dtype);
  for (int64_t classes : kRowClasses)
    for (int i = 0; i < 6; ++i)
      random_call<T>(classes > 500 ? RowShape{2, 2, classes} : RowShape{3, 5, classes}, i % 3 == 0, random);
}

// Two blocks and more of losses; one of a cluster's blocks, and more than shared memory holds, of classes.
template <class T>
void many() {
  Random random(350 + (int)Format<T>::dtype);
  random_call<T>({1, 9001, 2}, true, random);
  for (int64_t bytes : {70 << 10, 180 << 10})
    for (bool plain : {true, false}) random_call<T>({1, 1, bytes / (int64_t)sizeof(T) + 5}, plain, random);
}

}  // namespace

TEST(cross_entropy) {
  each_dtype([](auto element) { random_calls<decltype(element)>(); });
  many<float>();
  many<bf16>();
}

}  // namespace test
