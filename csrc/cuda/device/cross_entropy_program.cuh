// Cross-entropy as a program of rows.cuh. With z = softcap(logit_scale x), m = max z, L = log sum exp(z - m) and target
// weights q_j (a class weight at the target, spread by label smoothing, or the probabilities), every output is a sum
// over j, and the gradient is p_j (a + b log p_j) - q_j with two numbers a, b per row:
//   loss = sum_j q_j (L - (z_j - m)) + z_loss lse^2     entropy = L - sum_j p_j (z_j - m)     lse = m + L
// A row is reduced, or its statistics are read back (backward), and its gradient is written, or not (forward).
#pragma once
#include "cuda/device/arguments.h"
#include "cuda/device/cross_entropy_state.cuh"
#include "cuda/device/rows.cuh"

namespace rf::cuda {

// plain: class indices, no smoothing, no transformed logits, no entropy, no argmax. Twice as few instructions.
template <class T, bool plain>
struct CrossEntropyProgram {
  using A = acc_t<T>;
  using Element = T;
  using State = std::conditional_t<plain, MaxSum<A>, CrossEntropyState<A>>;
  static constexpr int kPlanes = plain ? 1 : 2, kW = kWidth<T>;
  struct Item {
    Vec<T> plane[kPlanes];  // logits, probabilities
  };
  struct Row {
    bool reads;
    int64_t first;
    const T *x, *t;
    int64_t y;  // class of the target, -1 where there is none
    bool ignored;
    A zy;  // its logit, before a gradient may take its place
    A max, log_sum;
    // Of the gradient: p (a + b log p) - w (spread + keep t) + logprob t, less `hot` at y.
    A a, b, hot, spread, keep, logprob;
    T *dx, *dt;
  };

  CrossEntropyRows args;
  CrossEntropyResults out;
  CrossEntropyUpstream up;
  bool reduces, emits;
  int64_t rows, classes;
  int planes;
  // Of args, in the type that they are computed with: conversions from double take as long as 64 additions on some
  // GPUs.
  A keep, spread;                 // 1 - label_smoothing, label_smoothing / classes
  A scale, cap, per_cap, z_loss;  // cap 0: none

  CrossEntropyProgram(const CrossEntropyRows& a, const CrossEntropyResults& results,
                      const CrossEntropyUpstream& upstream, bool reduces, bool emits)
      : args(a),
        out(results),
        up(upstream),
        reduces(reduces),
        emits(emits),
        rows(a.rows),
        classes(a.classes),
        planes(a.probabilities ? 2 : 1),
        keep(A(1 - a.label_smoothing)),
        spread(A(a.label_smoothing / (double)a.classes)),
        scale(A(a.logit_scale)),
        cap(A(a.softcap)),
        per_cap(a.softcap == 0 ? A(0) : A(1 / a.softcap)),
        z_loss(A(a.z_loss)) {}

  __device__ bool idle() const { return up.unless == up.unless && *(const A*)up.loss == A(up.unless); }
  __device__ Item blank() const { return {}; }

  __device__ bool inside(int64_t c) const { return 0 <= c && c < classes; }
  // Whether effective target weights other than the target's own count, so that their sums are of use.
  __device__ bool has_masses(const Row& row) const { return row.t || (row.y >= 0 && spread != A(0)); }
  // Whether gradients of what depends on the targets come in.
  __device__ bool of_targets() const { return reduces || up.loss || up.logprob; }
  __device__ A weight(int64_t c) const { return args.class_weight ? ((const A*)args.class_weight)[c] : A(1); }
  __device__ A transformed(A x) const {
    if constexpr (plain) return x;
    x *= scale;
    return cap == A(0) ? x : cap * tanh_of(x * per_cap);
  }
  __device__ static A at(const void* per_row, int64_t r) { return per_row ? ((const A*)per_row)[r] : A(0); }
  __device__ static void put(void* per_row, int64_t r, A value) {
    if (per_row) ((A*)per_row)[r] = value;
  }

  __device__ Row row(int64_t r) const {
    Row row = {};
    row.x = (const T*)args.logits + args.layout.offset(r);
    row.first = first_vector(row.x, args.layout.class_stride);
    row.y = -1;
    if (args.target) {
      const int64_t y = args.target[r];
      row.ignored = y == args.ignore_index;
      RF_DEVICE_ASSERT(row.ignored || inside(y), "regfast.cross_entropy: target: expected a class of the logits");
      if (!row.ignored && inside(y)) row.y = y;
    }
    if constexpr (!plain)
      if (args.probabilities && of_targets()) row.t = (const T*)args.probabilities + args.probability_layout.offset(r);
    if (reduces && row.y >= 0) row.zy = transformed(widen(row.x[row.y * args.layout.class_stride]));
    if (up.grad_logits) row.dx = (T*)up.grad_logits + up.grad_layout.offset(r);
    if constexpr (!plain)
      if (up.grad_probabilities) row.dt = (T*)up.grad_probabilities + up.grad_probability_layout.offset(r);
    // An ignored row counts only where something other than the loss is made of it.
    row.reads = !row.ignored || (reduces ? out.lse || args.row_entropy || out.argmax
                                         : at(up.lse, r) != A(0) || at(up.entropy, r) != A(0));
    return row;
  }

  __device__ Item load(const Row& row, int64_t j) const {
    Item item;
    item.plane[0] = load_vec(row.x, args.layout.class_stride, j, classes, narrowed<T>(minus_infinity<A>()));
    if constexpr (!plain) {
      if (row.t)
        item.plane[1] = load_vec(row.t, args.probability_layout.class_stride, j, classes, narrowed<T>(A(0)));
      else
        item.plane[1] = {};
    }
    return item;
  }

  __device__ void add(State& s, const Row& row, const Item& item, int64_t j) const {
    A z[kW];
    widen(item.plane[0], z);
    if constexpr (plain) {
      add_vector<T>(s, z);
    } else {
      A t[kW];
      widen(item.plane[1], t);
#pragma unroll
      for (int i = 0; i < kW; ++i) z[i] = inside(j + i) ? transformed(z[i]) : minus_infinity<A>();
      s.template track<T>(z, j, classes, out.argmax != nullptr);
      s.template add_exponentials<T>(z, args.row_entropy != nullptr);
      if (has_masses(row)) {
        const A from = origin(s.max);
#pragma unroll
        for (int i = 0; i < kW; ++i)
          if (inside(j + i)) s.add_target(z[i] - from, t[i], weight(j + i) * (keep * t[i] + spread));
      }
    }
  }

  __device__ void finish(Row& row, const State& s, int64_t r, bool leader) const {
    if (reduces) {
      // For backward, +inf is the maximum only where there is no NaN beside it.
      row.max = !row.reads ? A(0) : s.max == -minus_infinity<A>() && s.sum != s.sum ? s.sum : s.max;
      row.log_sum = row.reads ? log_of(normalizer(s.max, s.sum)) : A(0);
      if (leader) write_results(row, s, r);
    } else {
      row.max = ((const A*)args.row_max)[r];
      // Of a row with +inf, probabilities are NaN, but exp(z - lse), the derivative of lse alone, is 0 beside them.
      const bool apart = !of_targets() && !up.entropy && row.max == -minus_infinity<A>();
      row.log_sum = apart ? A(0) : ((const A*)args.row_log_sum)[r];
    }
    if (emits && row.reads) prepare_gradient(row, s, r);
  }

  __device__ void emit(const Row& row, const Item& item, int64_t j) const {
    if (!row.reads) {  // it may hold NaN, of which nothing times 0 is 0
      if (row.dx) store_vec(row.dx, up.grad_layout.class_stride, j, classes, Vec<T>{});
      return;
    }
    A z[kW], g[kW];
    widen(item.plane[0], z);
    if constexpr (plain) {
#pragma unroll
      for (int i = 0; i < kW; ++i) g[i] = exp_of<T>(z[i] - row.max - row.log_sum) * row.a;
    } else {
      A t[kW], dt[kW];
      widen(item.plane[1], t);
#pragma unroll
      for (int i = 0; i < kW; ++i) {
        z[i] = transformed(z[i]);
        const A log_p = z[i] - row.max - row.log_sum, w = inside(j + i) ? weight(j + i) : A(0);
        dt[i] = of_targets() ? log_p * (row.logprob - row.keep * w) : A(0);
        const A p = exp_of<T>(log_p);
        g[i] = p * row.a;
        if (row.b != A(0)) g[i] += row.b * (p * bounded_exponent(log_p));  // p log p first: it is bounded
        if (has_masses(row)) g[i] -= w * (row.keep * t[i] + row.spread) - row.logprob * t[i];
      }
      if (row.dt) store_vec(row.dt, up.grad_probability_layout.class_stride, j, classes, narrowed_vec<T>(dt));
      if (!row.dx) return;
    }
    if (j <= row.y && row.y < j + kW) {  // before anything is rounded
#pragma unroll
      for (int i = 0; i < kW; ++i)
        if (j + i == row.y) g[i] -= row.hot;
    }
    if constexpr (!plain) {
#pragma unroll
      for (int i = 0; i < kW; ++i) {
        const A u = cap == A(0) ? A(0) : z[i] * per_cap;
        g[i] *= (A(1) - u * u) * scale;  // dz / dx
      }
    }
    store_vec(row.dx, up.grad_layout.class_stride, j, classes, narrowed_vec<T>(g));
  }

 private:
  __device__ void write_results(const Row& row, const State& s, int64_t r) const {
    const A lse = row.max == -minus_infinity<A>() ? row.max : row.max + row.log_sum;
    A loss = A(0), logprob = A(0);
    if (row.y >= 0) {
      logprob = (row.zy - row.max) - row.log_sum;
      loss = -keep * weight(row.y) * logprob;
    }
    if constexpr (!plain) {
      if (has_masses(row)) loss += s.q_mass * row.log_sum - s.q_dot;
      if (row.t) logprob = s.t_dot - s.t_mass * row.log_sum;
      put(args.row_entropy, r, row.log_sum - s.weighted / s.sum);
      put(args.row_mass, r, s.q_mass);
      put(args.row_target_mass, r, s.t_mass);
      if (out.argmax) out.argmax[r] = s.argmax();
    }
    if (z_loss != A(0) && !row.ignored) loss += z_loss * lse * lse;
    put(args.row_max, r, row.max);
    put(args.row_log_sum, r, row.log_sum);
    put(out.loss, r, loss);
    put(out.lse, r, lse);
    put(out.logprob, r, logprob);
  }

  __device__ void prepare_gradient(Row& row, const State& s, int64_t r) const {
    A loss = A(0);
    if (!row.ignored) {
      loss = reduces ? A(up.of_total) : up.loss ? ((const A*)up.loss)[r * up.loss_stride] : A(0);
      if (up.weight_sum) loss /= A(*up.weight_sum);
      row.logprob = at(up.logprob, r);
    }
    row.a = at(up.lse, r);
    if (row.y >= 0) {
      row.hot = loss * keep * weight(row.y) - row.logprob;
      row.a += row.hot;
    }
    if constexpr (!plain) {
      if (row.t) {
        row.keep = loss * keep;
        row.spread = loss * spread;
        // In one pass with the reduction only the leader knows what is in memory.
        row.a += loss * (reduces ? s.q_mass : at(args.row_mass, r));
        row.a -= row.logprob * (reduces ? s.t_mass : at(args.row_target_mass, r));
      } else if (has_masses(row)) {
        row.spread = loss * spread;
        row.a += row.spread * (args.class_weight_sum ? *(const A*)args.class_weight_sum : A(classes));
      }
      row.b = -at(up.entropy, r);
      if (row.b != A(0)) row.a += row.b * at(args.row_entropy, r);
    }
    if (z_loss != A(0) && loss != A(0)) row.a += loss * A(2) * z_loss * (row.max + row.log_sum);
  }
};

}  // namespace rf::cuda
