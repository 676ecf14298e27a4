// Row ranges of the softmax family and of cross-entropy. Where the class dimension is not adjacent in memory, tiles of
// kTileRows rows are transposed into scratch, the row kernels run there, and the results are transposed back.

// Tile from memory: to[row][class], rows adjacent in memory along `inner` with inner_stride.
template <class T>
inline void gather_tile(const T* base, const RowLayout& l, int64_t row, int64_t rows, int64_t classes, acc_t<T>* to) {
  const T* p = base + l.offset(row);
  if constexpr (!std::is_same_v<T, double>) {
    if (l.inner_stride == 1 && f32v::size > 1) {
      constexpr int64_t W = f32v::size;
      for (int64_t r0 = 0; r0 < rows; r0 += W) {
        const int64_t lanes = std::min<int64_t>(W, rows - r0);
        for (int64_t c0 = 0; c0 < classes; c0 += W) {
          const int64_t count = std::min<int64_t>(W, classes - c0);
          f32v block[W];
          for (int64_t c = 0; c < W; ++c) {
            const T* q = p + (c0 + c) * l.class_stride + r0;
            block[c] = c >= count ? set1(0.0f) : lanes == W ? load(q) : load_n(q, lanes);
          }
          transpose(block);
          for (int64_t r = 0; r < lanes; ++r) {
            float* q = to + (r0 + r) * classes + c0;
            if (count == W)
              store(q, block[r]);
            else
              store_n(q, block[r], count);
          }
        }
      }
      return;
    }
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t r = 0; r < rows; ++r) to[r * classes + c] = load_one(p + c * l.class_stride + r * l.inner_stride);
}

template <class T>
inline void scatter_tile(const acc_t<T>* from, T* base, const RowLayout& l, int64_t row, int64_t rows,
                         int64_t classes) {
  T* p = base + l.offset(row);
  if constexpr (!std::is_same_v<T, double>) {
    if (l.inner_stride == 1 && f32v::size > 1) {
      constexpr int64_t W = f32v::size;
      for (int64_t r0 = 0; r0 < rows; r0 += W) {
        const int64_t lanes = std::min<int64_t>(W, rows - r0);
        for (int64_t c0 = 0; c0 < classes; c0 += W) {
          const int64_t count = std::min<int64_t>(W, classes - c0);
          f32v block[W];
          for (int64_t r = 0; r < W; ++r) {
            const float* q = from + (r0 + r) * classes + c0;
            block[r] = r >= lanes ? set1(0.0f) : count == W ? load(q) : load_n(q, count);
          }
          transpose(block);
          for (int64_t c = 0; c < count; ++c) {
            T* q = p + (c0 + c) * l.class_stride + r0;
            if (lanes == W)
              store(q, block[c]);
            else
              store_n(q, block[c], lanes);
          }
        }
      }
      return;
    }
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t r = 0; r < rows; ++r) store_one(p + c * l.class_stride + r * l.inner_stride, from[r * classes + c]);
}

// Rows of the tile that starts at `row`: never across a step of the outer dimension.
inline int64_t tile_rows(const RowLayout& l, int64_t row, int64_t end) {
  return std::min(std::min<int64_t>(tuning::kTileRows, l.inner - row % l.inner), end - row);
}

template <class T>
inline void softmax_forward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  T* y = (T*)a.output;
  if (a.in.class_stride == 1 && a.out.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r) softmax_row(x + a.in.offset(r), y + a.out.offset(r), a.classes, a.log);
    return;
  }
  if (vec_t<T>::size > 1 && a.classes <= tuning::kLaneClasses && a.in.inner_stride == 1 && a.out.inner_stride == 1) {
    for (int64_t r = begin, lanes; r < end; r += lanes) {
      lanes = std::min<int64_t>(vec_t<T>::size, tile_rows(a.in, r, end));
      softmax_lanes(x + a.in.offset(r), a.in.class_stride, y + a.out.offset(r), a.out.class_stride, a.classes, lanes,
                    a.log);
    }
    return;
  }
  A* tile = (A*)a.scratch;
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    for (int64_t i = 0; i < rows; ++i) softmax_row(tile + i * a.classes, tile + i * a.classes, a.classes, a.log);
    scatter_tile(tile, y, a.out, r, rows, a.classes);
  }
}

template <class T>
inline void softmax_backward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T *y = (const T*)a.input, *g = (const T*)a.grad;
  T* dx = (T*)a.output;
  if (a.in.class_stride == 1 && a.grad_in.class_stride == 1 && a.out.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r)
      softmax_backward_row(g + a.grad_in.offset(r), y + a.in.offset(r), dx + a.out.offset(r), a.classes, a.log);
    return;
  }
  if (vec_t<T>::size > 1 && a.classes <= tuning::kLaneClasses && a.in.inner_stride == 1 &&
      a.grad_in.inner_stride == 1 && a.out.inner_stride == 1) {
    for (int64_t r = begin, lanes; r < end; r += lanes) {
      lanes = std::min<int64_t>(vec_t<T>::size, tile_rows(a.in, r, end));
      softmax_backward_lanes(g + a.grad_in.offset(r), a.grad_in.class_stride, y + a.in.offset(r), a.in.class_stride,
                             dx + a.out.offset(r), a.out.class_stride, a.classes, lanes, a.log);
    }
    return;
  }
  A *y_tile = (A*)a.scratch, *g_tile = y_tile + tuning::kTileRows * a.classes;
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(y, a.in, r, rows, a.classes, y_tile);
    gather_tile(g, a.grad_in, r, rows, a.classes, g_tile);
    for (int64_t i = 0; i < rows; ++i)
      softmax_backward_row(g_tile + i * a.classes, y_tile + i * a.classes, g_tile + i * a.classes, a.classes, a.log);
    scatter_tile(g_tile, dx, a.out, r, rows, a.classes);
  }
}

// +inf dominates any finite value, as the limit does; a NaN dominates both.
template <class T>
inline acc_t<T> row_logsumexp(const T* x, int64_t n) {
  using A = acc_t<T>;
  RowStats<A> s = row_stats(x, n);
  if (s.max != -minus_infinity<A>()) return A(s.max + s.log_sum);
  for (int64_t j = 0; j < n; ++j) {
    A v = load_one(x + j);
    if (v != v) return v;
  }
  return s.max;
}

template <class T>
inline void logsumexp_forward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  A *result = (A*)a.row_result, *tile = (A*)a.scratch;
  if (a.in.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r) result[r] = row_logsumexp(x + a.in.offset(r), a.classes);
    return;
  }
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    for (int64_t i = 0; i < rows; ++i) result[r + i] = row_logsumexp(tile + i * a.classes, a.classes);
  }
}

template <class T>
inline void logsumexp_backward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = (const T*)a.input;
  T* dx = (T*)a.output;
  const A *lse = (const A*)a.row_result, *g = (const A*)a.row_grad;
  if (a.in.class_stride == 1 && a.out.class_stride == 1) {
    for (int64_t r = begin; r < end; ++r)
      logsumexp_backward_row(x + a.in.offset(r), dx + a.out.offset(r), a.classes, g[r], lse[r]);
    return;
  }
  A* tile = (A*)a.scratch;
  for (int64_t r = begin, rows; r < end; r += rows) {
    rows = tile_rows(a.in, r, end);
    gather_tile(x, a.in, r, rows, a.classes, tile);
    for (int64_t i = 0; i < rows; ++i)
      logsumexp_backward_row(tile + i * a.classes, tile + i * a.classes, a.classes, g[r + i], lse[r + i]);
    scatter_tile(tile, dx, a.out, r, rows, a.classes);
  }
}

inline bool class_out_of_range(const CrossEntropyArgs& a, int64_t row) {
  return a.target && a.target[row] != a.ignore_index && (a.target[row] < 0 || a.target[row] >= a.classes);
}

template <class T>
inline CrossEntropyPartial cross_entropy_forward(const CrossEntropyArgs& a, const CrossEntropyOutputs& out,
                                                 int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t r = begin; r < end; ++r)
    if (class_out_of_range(a, r)) return {0, 0, r};
  CompensatedSum losses, weights;
  const T *x = (const T*)a.logits, *t = (const T*)a.probabilities;
  const bool direct = a.layout.class_stride == 1 && (!t || a.probability_layout.class_stride == 1);
  if constexpr (!std::is_same_v<T, double> && f32v::size > 1) {
    const bool plain =
        !t && !a.row_entropy && !out.argmax && a.label_smoothing == 0 && a.softcap == 0 && a.logit_scale == 1;
    if (plain && (direct || a.layout.inner_stride == 1) && a.classes <= tuning::kNarrowClasses) {
      for (int64_t r = begin, rows; r < end; r += rows) {
        rows = std::min<int64_t>(f32v::size, direct ? end - r : tile_rows(a.layout, r, end));
        cross_entropy_narrow_rows(x, a, out, r, rows, &losses, &weights);
      }
      return {losses.value(), weights.value(), -1};
    }
  }
  A *x_tile = (A*)a.scratch, *t_tile = x_tile + tuning::kTileRows * a.classes;
  for (int64_t r = begin, rows; r < end; r += rows) {
    double loss;
    if (direct) {
      rows = 1;
      const T* probabilities = t ? t + a.probability_layout.offset(r) : nullptr;
      weights.add(cross_entropy_row(x + a.layout.offset(r), probabilities, a, out, r, &loss));
      losses.add(loss);
      continue;
    }
    rows = tile_rows(a.layout, r, end);
    gather_tile(x, a.layout, r, rows, a.classes, x_tile);
    if (t) gather_tile(t, a.probability_layout, r, rows, a.classes, t_tile);
    for (int64_t i = 0; i < rows; ++i) {
      const A* probabilities = t ? t_tile + i * a.classes : nullptr;
      weights.add(cross_entropy_row<A>(x_tile + i * a.classes, probabilities, a, out, r + i, &loss));
      losses.add(loss);
    }
  }
  return {losses.value(), weights.value(), -1};
}

template <class T>
inline void cross_entropy_backward(const CrossEntropyArgs& a, const CrossEntropyGrads& g, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T *x = (const T*)a.logits, *t = (const T*)a.probabilities;
  T *dx = (T*)g.grad_logits, *dt = (T*)g.grad_probabilities;
  const bool direct = a.layout.class_stride == 1 && (!t || a.probability_layout.class_stride == 1) &&
                      (!dx || g.grad_layout.class_stride == 1) && (!dt || g.grad_probability_layout.class_stride == 1);
  A *x_tile = (A*)a.scratch, *t_tile = x_tile + tuning::kTileRows * a.classes;
  A* dt_tile = t_tile + tuning::kTileRows * a.classes;
  for (int64_t r = begin, rows; r < end; r += rows) {
    if (direct) {
      rows = 1;
      cross_entropy_backward_row(x + a.layout.offset(r), t ? t + a.probability_layout.offset(r) : nullptr,
                                 dx ? dx + g.grad_layout.offset(r) : nullptr,
                                 dt ? dt + g.grad_probability_layout.offset(r) : nullptr, a, g, r);
      continue;
    }
    rows = tile_rows(a.layout, r, end);
    gather_tile(x, a.layout, r, rows, a.classes, x_tile);
    if (t) gather_tile(t, a.probability_layout, r, rows, a.classes, t_tile);
    CrossEntropyGrads in_cache = g;
    in_cache.stream = false;
    for (int64_t i = 0; i < rows; ++i) {
      A* row = x_tile + i * a.classes;  // the logits' gradient takes their place
      cross_entropy_backward_row<A>(row, t ? t_tile + i * a.classes : nullptr, dx ? row : nullptr,
                                    dt ? dt_tile + i * a.classes : nullptr, a, in_cache, r + i);
    }
    if (dx) scatter_tile(x_tile, dx, g.grad_layout, r, rows, a.classes);
    if (dt) scatter_tile(dt_tile, dt, g.grad_probability_layout, r, rows, a.classes);
  }
  if (g.stream) stream_fence();
}
