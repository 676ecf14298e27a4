// What is tested of cross-entropy on every device, whose files say which sizes their kernels tell apart: random
// combinations of options, arrangements in memory and upstream gradients. Device has
//   Memory                 which is told of the buffers that a call may read or write (memory.h)
//   forward<T>(problem, rows, class_weight_sum, outputs, reduction)          the Sums over all rows
//   backward<T>(problem, rows, class_weight_sum, gradients, mean_of, stream) mean_of: a mean's denominator, or null
//   least_log_p<T>()       the logarithm of a probability that the gradient may take for zero
#pragma once
#include <cmath>
#include <optional>
#include <vector>

#include "cross_entropy_reference.h"
#include "layouts.h"
#include "shared/problems.h"

namespace test {

enum class Reduction { none, mean, sum };

struct Sums {
  std::optional<double> loss;  // where the device has taken it
  double weight = 0;           // a mean's denominator
  int64_t bad_row = -1;        // whose class is out of range, if the device tells
};

// Which gradients and outputs a call asks for, and how they lie.
struct Call {
  RowShape shape;
  Arrangement logits, probabilities, grad, grad_t;
  Reduction reduction;
  bool in_place, stream, want_dx, want_dt, loss, lse, entropy, logprob, argmax;
};

struct Case {
  Call call;
  Options options;
};

// `plain`: the call of an ordinary training step, which kernels treat specially. `one_pass`: one whose gradient of the
// logits comes with the loss from one read.
inline Case random_case(const RowShape& shape, bool plain, bool one_pass, Random& random) {
  const auto output = [&] { return kArrangements[random.integer(0, kOutputArrangements - 1)]; };
  Options o;
  Call c = {};
  c.shape = shape;
  c.reduction = (Reduction)random.integer(one_pass ? 1 : 0, 2);
  o.weighted = random.chance(0.4);
  // A mean over no rows is not a number.
  const bool all_ignored = shape.classes == 1 && c.reduction == Reduction::mean;
  o.ignore_index = random.chance(0.5) || all_ignored ? -100 : shape.classes / 2;
  o.z_loss = random.chance(0.3) ? 0.01 : 0;
  c.in_place = random.chance(0.25);
  c.logits = random.chance(0.5) ? Arrangement::rows : random.chance(0.3) ? Arrangement::padded : output();
  c.stream = random.chance(0.4);
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
    if (!one_pass) {
      c.want_dx = !o.probabilities || random.chance(0.8);
      c.want_dt = o.probabilities && (random.chance(0.7) || !c.want_dx);
      c.loss = random.chance(0.8);
    }
  }
  c.probabilities = random.chance(0.5) ? c.logits : kArrangements[random.integer(0, kInputArrangements - 1)];
  c.grad = random.chance(0.7) && c.logits != Arrangement::expanded ? c.logits : output();
  c.grad_t = random.chance(0.5) ? c.grad : output();
  return {c, o};
}

template <class Device, class T>
class CrossEntropyTest {
 public:
  using A = rf::acc_t<T>;

  CrossEntropyTest(const Case& of, Random& random, const char* pass = "")
      : c(of.call),
        o(of.options),
        guard(random.chance(0.7) ? Guard::behind : Guard::before),
        rows(c.shape.rows()),
        shift(random.integer(0, 7)),
        x(c.shape, c.logits, guard, shift, [&] { return 3 * random.spiky(); }),
        dx(c.shape, c.grad, guard, random.chance(0.5) ? shift : 0),
        t(probability_shape(), c.probabilities, guard, 0,
          [&, most = 2.0 / (double)c.shape.classes] { return random.chance(0.2) ? 0 : most * random.uniform(); }),
        dt(probability_shape(), c.grad_t, guard, shift),
        w(filled<A>(
            c.shape.classes, [&] { return random.chance(0.1) ? 0 : random.between(0.2, 2); }, guard)),
        target(rows, guard),
        max(rows, guard),
        log_sum(rows, guard),
        entropy(rows, guard),
        mass(rows, guard),
        target_mass(rows, guard),
        loss(rows, guard),
        lse(rows, guard),
        logprob(rows, guard),
        argmax(rows, guard),
        grad_loss(upstream(random)),
        grad_lse(upstream(random)),
        grad_entropy(upstream(random)),
        grad_logprob(upstream(random)) {
    describe(
        "cross_entropy %s outer=%lld inner=%lld classes=%lld %s%s%s prob=%d(%s) grad=%s,%s w=%d smooth=%d zloss=%d "
        "cap=%d scale=%d stream=%d reduction=%d outputs=%d%d%d%d%d ignore=%lld",
        Format<T>::name, (long long)c.shape.outer, (long long)c.shape.inner, (long long)c.shape.classes,
        kArrangementNames[(int)c.logits], pass, c.in_place ? " in place" : "", o.probabilities,
        kArrangementNames[(int)c.probabilities], kArrangementNames[(int)c.grad], kArrangementNames[(int)c.grad_t],
        o.weighted, o.smoothing != 0, o.z_loss != 0, o.softcap != 0, o.logit_scale != 1, c.stream, (int)c.reduction,
        c.loss, c.lse, c.entropy, c.logprob, c.argmax, (long long)o.ignore_index);
    for (int64_t r = 0; r < rows; ++r)
      target[r] = random.chance(0.2) ? o.ignore_index : random.integer(0, c.shape.classes - 1);
    if (c.reduction == Reduction::mean) {  // of a row at least, whose class weighs something
      target[0] = o.ignore_index == 0 ? c.shape.classes - 1 : 0;
      w[target[0]] = 1;
    }
    if (!c.in_place) x.memory.read_only();
    t.memory.read_only();
    w.read_only();
    target.read_only();
    for (int64_t r = 0; r < rows; ++r) inputs.push_back(row(r));
    for (const Row& r : inputs) expected.push_back(cross_entropy_row(r, o));
  }

  void run() {
    const rf::CrossEntropyProblem asked = problem();
    const With with(asked);
    {
      typename Device::Memory memory;
      memory.read(std::as_const(x.memory));
      lend_for_results(memory);
      sums = Device::template forward<T>(problem(), rows, class_weight_sum(), outputs(), c.reduction);
    }
    check_results();
    const std::vector<T> before = x.memory.copy();
    {
      typename Device::Memory memory;
      if (!c.in_place) memory.read(std::as_const(x.memory));
      memory.write(gradient().memory, dt.memory);
      memory.read(grad_loss, grad_lse, grad_entropy, grad_logprob);
      lend_for_gradients(memory);
      Device::template backward<T>(problem(), rows, class_weight_sum(), gradients(),
                                   c.reduction == Reduction::mean ? &sums.weight : nullptr, c.stream);
    }
    check_gradients([&](int64_t r) {
      return Upstream{c.loss ? factor() * grad_loss.value(c.reduction == Reduction::none ? r : 0) : 0,
                      c.lse ? grad_lse.value(r) : 0, c.entropy ? grad_entropy.value(r) : 0,
                      c.logprob ? grad_logprob.value(r) : 0};
    });
    CHECK(x.memory.rest_equals(before));
  }

  // ---- what kernels are given --------------------------------------------------------------------------------------

  rf::CrossEntropyProblem problem() {
    rf::CrossEntropyProblem p = {};
    p.logits = x.memory.data();
    p.layout = x.layout;
    p.classes = c.shape.classes;
    if (o.probabilities) {
      p.probabilities = t.memory.data();
      p.probability_layout = t.layout;
    } else {
      p.target = target.data();
    }
    p.class_weight = o.weighted ? w.data() : nullptr;
    p.ignore_index = o.ignore_index;
    p.label_smoothing = o.smoothing;
    p.z_loss = o.z_loss;
    p.softcap = o.softcap;
    p.logit_scale = o.logit_scale;
    p.row_max = max.data();
    p.row_log_sum = log_sum.data();
    p.row_entropy = c.entropy ? entropy.data() : nullptr;
    p.row_mass = o.probabilities ? mass.data() : nullptr;
    p.row_target_mass = o.probabilities ? target_mass.data() : nullptr;
    return p;
  }
  // Of so many ones where classes have no weights.
  double class_weight_sum() const {
    double sum = 0;
    for (int64_t j = 0; j < w.count(); ++j) sum += o.weighted ? w.value(j) : 1;
    return sum;
  }
  rf::CrossEntropyOutputs outputs() {
    return {c.loss ? loss.data() : nullptr, c.lse ? lse.data() : nullptr, c.logprob ? logprob.data() : nullptr,
            c.argmax ? argmax.data() : nullptr};
  }
  rf::CrossEntropyBackward gradients() {
    rf::CrossEntropyBackward g = {};
    g.loss = c.loss ? grad_loss.data() : nullptr;
    g.loss_stride = c.reduction == Reduction::none ? 1 : 0;
    g.lse = c.lse ? grad_lse.data() : nullptr;
    g.entropy = c.entropy ? grad_entropy.data() : nullptr;
    g.logprob = c.logprob ? grad_logprob.data() : nullptr;
    if (c.in_place || c.want_dx) {
      g.grad_logits = gradient().memory.data();
      g.grad_layout = gradient().layout;
    }
    if (c.want_dt) {
      g.grad_probabilities = dt.memory.data();
      g.grad_probability_layout = dt.layout;
    }
    return g;
  }
  Rows<T>& gradient() { return c.in_place ? x : dx; }
  // By what the upstream gradient of the loss is multiplied for each row.
  double factor() const { return c.reduction == Reduction::mean ? 1 / sums.weight : 1; }

  // What each pass touches besides the logits.
  template <class M>
  void lend_for_results(M& memory) {
    memory.read(std::as_const(t.memory), std::as_const(w), std::as_const(target));
    memory.write(loss, lse, logprob, argmax, max, log_sum, entropy, mass, target_mass);
  }
  template <class M>
  void lend_for_gradients(M& memory) {
    memory.read(std::as_const(t.memory), std::as_const(w), std::as_const(target), std::as_const(max),
                std::as_const(log_sum), std::as_const(entropy), std::as_const(mass), std::as_const(target_mass));
  }

  // ---- what they should have made of it ----------------------------------------------------------------------------

  void check_results() {
    Sum total = 0, denominator = 0;
    int64_t wrong_argmax = 0;
    double total_units = 0, total_size = 0;
    {
      Comparison<A> of_loss("loss"), of_lse("lse"), of_entropy("entropy"), of_logprob("logprob"), of_max("row_max"),
          of_log_sum("row_log_sum");
      for (int64_t r = 0; r < rows; ++r) {
        const Result& e = expected[r];
        // An ignored row of which nothing is asked need not be read.
        const bool unread = inputs[r].ignored && !c.lse && !c.entropy && !c.argmax && max.value(r) == 0;
        of_max.add(max.result(r), unread ? 0 : e.max, e.z_units, r);
        of_log_sum.add(log_sum.result(r), unread ? 0 : e.log_sum, e.lse_units, r);
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
        if (o.probabilities) {
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
      if (sums.loss) of_total.add(*sums.loss, (double)total, (total_units + 2 * total_size) * scale, 0);
      of_weight.add(sums.weight, (double)denominator, long_sum_error(rows) * (double)denominator, 0);
    }
    CHECK(loss.rest_untouched() && lse.rest_untouched() && logprob.rest_untouched() && argmax.rest_untouched());
    CHECK(max.rest_untouched() && log_sum.rest_untouched() && entropy.rest_untouched());
    CHECK(mass.rest_untouched() && target_mass.rest_untouched());
  }

  template <class UpstreamOf>
  void check_gradients(UpstreamOf&& upstream_of) {
    {
      Comparison<T> of_dx("dx"), of_dt("dt");
      for (int64_t r = 0; r < rows; ++r) {
        const Gradient e =
            cross_entropy_gradient(inputs[r], o, expected[r], upstream_of(r), Device::template least_log_p<T>());
        for (int64_t j = 0; j < c.shape.classes; ++j) {
          if (c.in_place || c.want_dx) of_dx.add(gradient().result(r, j), e.x[j], e.x_units[j], gradient().at(r, j));
          if (c.want_dt) of_dt.add(dt.result(r, j), e.t[j], e.t_units[j], dt.at(r, j));
        }
      }
    }
    CHECK(dx.memory.rest_untouched() && dt.memory.rest_untouched());
  }

  const Call c;
  const Options o;
  const Guard guard;
  const int64_t rows, shift;
  Rows<T> x, dx, t, dt;  // t, dt: of one element where there are no probabilities
  Buffer<A> w;
  Buffer<int64_t> target;
  Buffer<A> max, log_sum, entropy, mass, target_mass, loss, lse, logprob;
  Buffer<int64_t> argmax;
  const Buffer<A> grad_loss, grad_lse, grad_entropy, grad_logprob;
  Sums sums;

 private:
  RowShape probability_shape() const { return o.probabilities ? c.shape : RowShape{1, 1, 1}; }
  Buffer<A> upstream(Random& random) const {
    return input<A>(rows, [&] { return random.spiky(); }, guard);
  }
  Row row(int64_t r) const {
    Row v;
    v.x = x.row(r);
    v.w.assign(c.shape.classes, 1.0);
    if (o.weighted)
      for (int64_t j = 0; j < w.count(); ++j) v.w[j] = w.value(j);
    if (o.probabilities) {
      v.t = t.row(r);
    } else {
      v.t.assign(c.shape.classes, 0.0);
      v.target = target.data()[r];
      v.ignored = v.target == o.ignore_index;
      if (!v.ignored) v.t[v.target] = 1;
    }
    return v;
  }

  std::vector<Row> inputs;
  std::vector<Result> expected;
};

}  // namespace test
