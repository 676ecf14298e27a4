// softmax, log-softmax and log-sum-exp with their gradients, as programs of rows.cuh. The logarithm of a row's sum is
// kept apart from its maximum, which would swallow its digits.
#include "cuda/device/math.cuh"
#include "cuda/device/max_sum.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/launch.h"

namespace rf::cuda {
namespace {

enum class Mode { softmax, log_softmax, logsumexp, logsumexp_backward };

// y = exp(x - max) / sum, or x - max - log sum; or max + log sum alone; or g exp(x - lse).
template <class T>
struct SoftmaxProgram {
  using A = acc_t<T>;
  using Element = T;
  using State = MaxSum<A>;
  static constexpr int kPlanes = 1, planes = 1;
  // What a thread holds of a row between the passes, where rows are short enough: memory is read once.
  struct Item {
    Vec<T> plane[kPlanes];
  };
  struct Row {
    // Always, since no row is left out as cross-entropy's ignored ones are; `first`: where whole vectors begin.
    bool reads;
    int64_t first;
    const T* x;
    T* y;
    A shift, scale;  // y = exp(x - shift) scale, or x - shift - scale
  };

  int64_t rows, classes;
  const T* input;
  T* output;
  RowLayout in, out;
  A* row_result;
  const A* row_grad;
  Mode mode;
  bool reduces, emits;

  __device__ bool idle() const { return false; }
  // Of a row that is not read: there is none.
  __device__ Item blank() const { return {}; }
  __device__ Row row(int64_t r) const {
    const T* x = input + in.offset(r);
    return {true, first_vector(x, in.class_stride), x, output + out.offset(r), A(0), A(0)};
  }
  __device__ Item load(const Row& row, int64_t j) const {
    // Beyond the last class is -inf, whose exponential is 0: no lane is asked whether it counts.
    return {{load_vec(row.x, in.class_stride, j, classes, narrowed<T>(minus_infinity<A>()))}};
  }
  __device__ void add(State& s, const Row&, const Item& item, int64_t) const {
    A x[kWidth<T>];
    widen(item.plane[0], x);
    // A vector's maximum first, so that the sum so far is scaled once for all of it.
    add_vector<T>(s, x);
  }
  __device__ void finish(Row& row, const State& s, int64_t r, bool leader) const {
    if (mode == Mode::logsumexp_backward) {
      // Forward has left it: the row is read once, and nothing is reduced.
      row.shift = row_result[r];
      row.scale = row_grad[r];
    } else if (mode == Mode::logsumexp) {
      // The origin is 0 of an infinite maximum: the sum is then infinity or NaN itself.
      if (leader) row_result[r] = origin(s.max) + log_of(s.sum);
    } else {
      const A sum = normalizer(s.max, s.sum);
      row.shift = s.max;
      // One logarithm or division for a row, however many elements a thread has.
      row.scale = mode == Mode::log_softmax ? log_of(sum) : A(1) / sum;
    }
  }
  __device__ void emit(const Row& row, const Item& item, int64_t j) const {
    A x[kWidth<T>];
    widen(item.plane[0], x);
    // The shift first: logarithm and maximum together would cost the digits of whichever is smaller.
#pragma unroll
    for (A& v : x) v = mode == Mode::log_softmax ? v - row.shift - row.scale : exp_of<T>(v - row.shift) * row.scale;
    store_vec(row.y, out.class_stride, j, classes, narrowed_vec<T>(x));
  }
};

// softmax: dx = y (g - sum g y); log-softmax: dx = g - exp(y) sum g.
template <class T>
struct SoftmaxBackwardProgram {
  using A = acc_t<T>;
  using Element = T;
  using State = Sum<A>;
  static constexpr int kPlanes = 2, planes = 2;
  static constexpr bool reduces = true, emits = true;
  struct Item {
    Vec<T> plane[kPlanes];  // y, g
  };
  struct Row {
    bool reads;
    int64_t first;
    const T *y, *g;
    T* dx;
    A sum;
  };

  int64_t rows, classes;
  const T *output, *grad;
  T* grad_input;
  RowLayout out, grad_out, grad_in;
  bool log;

  __device__ bool idle() const { return false; }
  __device__ Item blank() const { return {}; }
  __device__ Row row(int64_t r) const {
    const T* y = output + out.offset(r);
    return {true, first_vector(y, out.class_stride), y, grad + grad_out.offset(r), grad_input + grad_in.offset(r),
            A(0)};
  }
  __device__ Item load(const Row& row, int64_t j) const {
    // Beyond the last class: zeros, which the sum of products does not see.
    const T zero = narrowed<T>(A(0));
    return {{load_vec(row.y, out.class_stride, j, classes, zero),
             load_vec(row.g, grad_out.class_stride, j, classes, zero)}};
  }
  __device__ void add(State& s, const Row&, const Item& item, int64_t) const {
    A y[kWidth<T>], g[kWidth<T>];
    widen(item.plane[0], y);
    widen(item.plane[1], g);
    // In order, and threads' sums by a tree of fixed shape: the same bits on every run.
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) s.sum += log ? g[i] : g[i] * y[i];
  }
  __device__ void finish(Row& row, const State& s, int64_t, bool) const { row.sum = s.sum; }
  __device__ void emit(const Row& row, const Item& item, int64_t j) const {
    A y[kWidth<T>], g[kWidth<T>];
    widen(item.plane[0], y);
    widen(item.plane[1], g);
    // dx takes the gradient's registers.
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) g[i] = log ? g[i] - exp_of<T>(y[i]) * row.sum : y[i] * (g[i] - row.sum);
    store_vec(row.dx, grad_in.class_stride, j, classes, narrowed_vec<T>(g));
  }
};

void run(DType dtype, const SoftmaxRows& a, Mode mode, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    SoftmaxProgram<T> p = {};
    p.rows = a.rows;
    p.classes = a.classes;
    p.input = (const T*)a.input;
    p.output = (T*)a.output;
    p.in = a.in;
    p.out = a.out;
    p.row_result = (A*)a.row_result;
    p.row_grad = (const A*)a.row_grad;
    p.mode = mode;
    // What is not needed of the two passes is left out: log-sum-exp writes no elements, its gradient sums none.
    p.reduces = mode != Mode::logsumexp_backward;
    p.emits = mode != Mode::logsumexp;
    run_rows(p, a.input, a.in, stream);
  });
}

}  // namespace

void launch_softmax_forward(DType dtype, const SoftmaxRows& a, cudaStream_t stream) {
  run(dtype, a, a.log ? Mode::log_softmax : Mode::softmax, stream);
}
void launch_logsumexp_forward(DType dtype, const SoftmaxRows& a, cudaStream_t stream) {
  run(dtype, a, Mode::logsumexp, stream);
}
void launch_logsumexp_backward(DType dtype, const SoftmaxRows& a, cudaStream_t stream) {
  run(dtype, a, Mode::logsumexp_backward, stream);
}

void launch_softmax_backward(DType dtype, const SoftmaxRows& a, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    SoftmaxBackwardProgram<T> p = {
        a.rows, a.classes, (const T*)a.input, (const T*)a.grad, (T*)a.output, a.in, a.grad_in, a.out, a.log};
    run_rows(p, a.input, a.in, stream);
  });
}

}  // namespace rf::cuda
