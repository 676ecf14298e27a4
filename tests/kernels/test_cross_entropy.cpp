// Cross-entropy over random combinations of its options, arrangements in memory, sizes and upstream gradients, against
// double precision.
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/drivers/drivers.h"
#include "cross_entropy_reference.h"
#include "layouts.h"

namespace test {
namespace {

using rf::CrossEntropyArgs;

// Which gradients and outputs a call asks for, and how they lie.
struct Call {
  RowShape shape;
  Arrangement logits, probabilities, grad, grad_t;
  bool in_place, stream, want_dx, want_dt, loss, lse, entropy, logprob, argmax;
  int64_t loss_stride;
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
        w(c.shape.classes, guard),
        target(rows, guard),
        max(rows, guard),
        log_sum(rows, guard),
        entropy(rows, guard),
        mass(rows, guard),
        target_mass(rows, guard) {
    for (int64_t j = 0; j < w.count(); ++j) w[j] = (A)(random.chance(0.1) ? 0 : random.between(0.2, 2));
    for (int64_t r = 0; r < rows; ++r)
      target[r] = random.chance(0.2) ? o.ignore_index : random.integer(0, c.shape.classes - 1);
    if (o.probabilities) {
      const double scale = 2.0 / (double)c.shape.classes;
      t.reset(new Rows<T>(c.shape, c.probabilities, guard, 0,
                          [&] { return random.chance(0.2) ? 0 : scale * random.uniform(); }));
      t->memory.read_only();
    }
    if (!c.in_place) x.memory.read_only();
    w.read_only();
    target.read_only();
    for (int64_t r = 0; r < rows; ++r) inputs.push_back(row(r));
    for (const Row& r : inputs) results.push_back(cross_entropy_row(r, o));
  }

  void run(Random& random) {
    forward();
    backward(random);
  }

 private:
  CrossEntropyArgs arguments() {
    CrossEntropyArgs a = {};
    a.logits = x.memory.data();
    a.layout = x.layout;
    a.classes = c.shape.classes;
    a.target = o.probabilities ? nullptr : target.data();
    if (t) {
      a.probabilities = t->memory.data();
      a.probability_layout = t->layout;
    }
    a.class_weight_sum = (double)a.classes;
    if (o.weighted) {
      a.class_weight = w.data();
      a.class_weight_sum = 0;
      for (int64_t j = 0; j < a.classes; ++j) a.class_weight_sum += w.value(j);
    }
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

  void forward() {
    Buffer<A> loss(rows, guard), lse(rows, guard), logprob(rows, guard);
    Buffer<int64_t> argmax(rows, guard);
    const rf::CrossEntropyOutputs out = {c.loss ? loss.data() : nullptr, c.lse ? lse.data() : nullptr,
                                         c.logprob ? logprob.data() : nullptr, c.argmax ? argmax.data() : nullptr};
    const rf::CrossEntropyPartial sums = rf::cross_entropy_forward(Format<T>::dtype, arguments(), out, rows);
    Sum total = 0, denominator = 0;
    int64_t wrong_argmax = 0;
    double total_units = 0, total_size = 0;
    {
      Comparison<A> of_loss("loss"), of_lse("lse"), of_entropy("entropy"), of_logprob("logprob"), of_max("row_max"),
          of_log_sum("row_log_sum");
      for (int64_t r = 0; r < rows; ++r) {
        const Result& e = results[r];
        of_max.add(max.result(r), e.max, e.z_units, r);
        of_log_sum.add(log_sum.result(r), e.log_sum, e.lse_units, r);
        if (c.loss) of_loss.add(loss.result(r), e.loss, e.loss_units, r);
        if (c.lse) of_lse.add(lse.result(r), e.lse, e.lse_units, r);
        if (c.entropy) of_entropy.add(entropy.result(r), e.entropy, e.entropy_units, r);
        if (c.logprob) of_logprob.add(logprob.result(r), e.logprob, e.logprob_units, r);
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
        total += e.loss;
        total_units += e.loss_units;
        total_size += std::fabs(e.loss);
        denominator += e.denominator;
      }
    }
    CHECK(sums.bad_row == -1);
    CHECK(wrong_argmax == 0);
    {
      Comparison<double> of_total("sum of losses"), of_weight("denominator");
      const double scale = kUnit<T> / kUnit<double>;
      of_total.add(sums.loss, (double)total, (total_units + 2 * total_size) * scale, 0);
      of_weight.add(sums.weight, (double)denominator, long_sum_error(rows) * (double)denominator, 0);
    }
    CHECK(loss.rest_untouched() && lse.rest_untouched() && logprob.rest_untouched() && argmax.rest_untouched());
    CHECK(max.rest_untouched() && log_sum.rest_untouched() && entropy.rest_untouched());
    CHECK(mass.rest_untouched() && target_mass.rest_untouched());
  }

  void backward(Random& random) {
    const auto upstream = [&] { return input<A>(rows, [&] { return random.spiky(); }, guard); };
    Buffer<A> g_loss = upstream(), g_lse = upstream(), g_entropy = upstream(), g_logprob = upstream();
    rf::CrossEntropyGrads g = {};
    g.loss = c.loss ? g_loss.data() : nullptr;
    g.loss_stride = c.loss_stride;
    g.loss_scale = 0.37;
    g.lse = c.lse ? g_lse.data() : nullptr;
    g.entropy = c.entropy ? g_entropy.data() : nullptr;
    g.logprob = c.logprob ? g_logprob.data() : nullptr;
    g.stream = c.stream;
    std::unique_ptr<Rows<T>> separate, dt;
    Rows<T>* dx = c.in_place ? &x : nullptr;
    if (!c.in_place && c.want_dx) dx = (separate.reset(new Rows<T>(c.shape, c.grad, guard, shift)), separate.get());
    if (dx) {
      g.grad_logits = dx->memory.data();
      g.grad_layout = dx->layout;
    }
    if (t && c.want_dt) {
      dt.reset(new Rows<T>(c.shape, c.grad_t, guard, shift));
      g.grad_probabilities = dt->memory.data();
      g.grad_probability_layout = dt->layout;
    }
    const std::vector<T> before = x.memory.copy();
    rf::cross_entropy_backward(Format<T>::dtype, arguments(), g, rows);
    {
      Comparison<T> of_dx("dx"), of_dt("dt");
      for (int64_t r = 0; r < rows; ++r) {
        Upstream up;
        if (c.loss) up.loss = g_loss.value(r * c.loss_stride) * g.loss_scale;
        if (c.lse) up.lse = g_lse.value(r);
        if (c.entropy) up.entropy = g_entropy.value(r);
        if (c.logprob) up.logprob = g_logprob.value(r);
        const Gradient e =
            cross_entropy_gradient(inputs[r], o, results[r], up, std::is_same_v<A, double> ? -689.9 : -68.9);
        for (int64_t j = 0; j < c.shape.classes; ++j) {
          if (dx) of_dx.add(dx->result(r, j), e.x[j], e.x_units[j], dx->at(r, j));
          if (dt) of_dt.add(dt->result(r, j), e.t[j], e.t_units[j], dt->at(r, j));
        }
      }
    }
    CHECK(x.memory.rest_equals(before));
    if (separate) CHECK(separate->memory.rest_untouched());
    if (separate && !dt) in_one_pass(g, *separate);
    if (dt) CHECK(dt->memory.rest_untouched());
  }

  // The gradient from exponentials that forward has kept has the same bits.
  void in_one_pass(rf::CrossEntropyGrads g, Rows<T>& wanted) {
    Rows<T> dx(c.shape, c.grad, guard, shift);
    g.grad_logits = dx.memory.data();
    g.grad_layout = dx.layout;
    rf::cross_entropy_forward_backward(Format<T>::dtype, arguments(), {}, g, rows);
    int64_t others = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < c.shape.classes; ++j) {
        const double a = dx.result(r, j), b = wanted.result(r, j);
        others += !(a == b || (a != a && b != b));
      }
    CHECK(others == 0);
    CHECK(dx.memory.rest_untouched());
  }

  const Call c;
  const Options o;
  const Guard guard;
  const int64_t rows, shift;
  Rows<T> x;
  Buffer<A> w;
  Buffer<int64_t> target;
  Buffer<A> max, log_sum, entropy, mass, target_mass;
  std::unique_ptr<Rows<T>> t;
  std::vector<Row> inputs;
  std::vector<Result> results;
};

// A plain call is that of an ordinary training step, which kernels treat specially.
template <class T>
void random_call(int64_t classes, bool plain, Random& random) {
  const auto output = [&] { return kArrangements[random.integer(0, kOutputArrangements - 1)]; };
  Options o;
  o.probabilities = random.chance(0.35);
  o.weighted = random.chance(0.4);
  o.ignore_index = random.chance(0.5) ? -100 : classes / 2;
  o.smoothing = random.chance(0.4) ? 0.1 : 0;
  o.z_loss = random.chance(0.3) ? 0.01 : 0;
  o.softcap = random.chance(0.3) ? 15 : 0;
  o.logit_scale = random.chance(0.3) ? 0.6 : 1;
  Call c = {};
  c.shape = shape_for(classes, random);
  c.logits = random.chance(0.5) ? Arrangement::rows : output();
  c.in_place = random.chance(0.25);
  if (!c.in_place && random.chance(0.1)) c.logits = Arrangement::expanded;
  c.probabilities = random.chance(0.5) ? c.logits : kArrangements[random.integer(0, kOutputArrangements)];
  c.grad = random.chance(0.7) && c.logits != Arrangement::expanded ? c.logits : output();
  c.grad_t = random.chance(0.5) ? c.grad : output();
  c.stream = random.chance(0.4);
  c.want_dx = !o.probabilities || random.chance(0.8);
  c.want_dt = random.chance(0.7) || !c.want_dx;
  c.loss = random.chance(0.8);
  c.lse = random.chance(0.3);
  c.entropy = random.chance(0.3);
  c.logprob = random.chance(0.3);
  c.argmax = random.chance(0.3);
  c.loss_stride = random.integer(0, 1);
  if (plain) {
    o = Options();
    o.weighted = random.chance(0.3);
    o.z_loss = random.chance(0.2) ? 0.01 : 0;
    c.logits = random.chance(0.7) ? Arrangement::rows : Arrangement::padded;
    c.grad = random.chance(0.7) ? c.logits : output();
    c.want_dx = c.loss = true;
    c.entropy = c.argmax = false;
  }
  describe(
      "cross_entropy %s outer=%lld inner=%lld classes=%lld %s%s prob=%d(%s) grad=%s,%s w=%d smooth=%d zloss=%d "
      "cap=%d scale=%d stream=%d outputs=%d%d%d%d%d ignore=%lld",
      Format<T>::name, (long long)c.shape.outer, (long long)c.shape.inner, (long long)classes,
      kArrangementNames[(int)c.logits], c.in_place ? " in place" : "", o.probabilities,
      kArrangementNames[(int)c.probabilities], kArrangementNames[(int)c.grad], kArrangementNames[(int)c.grad_t],
      o.weighted, o.smoothing != 0, o.z_loss != 0, o.softcap != 0, o.logit_scale != 1, c.stream, c.loss, c.lse,
      c.entropy, c.logprob, c.argmax, (long long)o.ignore_index);
  Problem<T>(c, o, random).run(random);
}

template <class T>
void all() {
  Random random(300 + (int)Format<T>::dtype);  // other cases for each type
  for (int64_t classes : kClasses)
    for (int i = 0, calls = fewer(classes > 1000 ? 24 : 32); i < calls; ++i)
      random_call<T>(classes, i % 4 == 0, random);
}

}  // namespace

TEST(cross_entropy) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
