// The loop over chunks of a linear model's rows, for every device and loss: the chunk's product into a panel that is
// used again and again, the row loss, which turns it into losses and their slopes where it lies, and the slopes
// multiplied into dX and dW, whose sum over the chunks stays in the accumulator's type. Nothing else has the size of
// all predictions.
#pragma once
#include <algorithm>

#include "shared/product.h"

namespace rf {

struct Chunk {
  int64_t begin, rows;
};
inline Tensor rows_of_chunk(const Tensor& t, const Chunk& c) { return rows_from(t, c.begin, c.rows); }

// Whether a matrix's elements lie apart along its rows and down its columns: where products read it several times, a
// chunk of it is better copied once.
inline bool is_scattered(const Tensor& t) { return t.size(1) > 1 && t.stride(1) != 1 && t.stride(0) != 1; }

// What a row loss inherits and may do otherwise. What it has to have is
//   Tensor turn(chunk, predictions)   its losses; returns the slopes, undefined where nothing is to be multiplied
struct RowLossOfAll {
  Tensor read(const Tensor& x, const Chunk& c) const { return rows_of_chunk(x, c); }
  // Where a chunk's rows of dX are written, and what becomes of them then.
  Tensor to_write(const Tensor& dx, const Chunk& c) const { return rows_of_chunk(dx, c); }
  void written(const Tensor& /*dx*/, const Chunk&, const Tensor& /*rows*/) const {}
  // Whether it has made the products of the slopes in a way of its own.
  bool multiply_slopes(const Chunk&, const Tensor& /*x*/, const Tensor& /*slopes*/) const { return false; }
};

struct LinearModel {
  const Tensor &x, &w, &bias;  // rows x D, outputs x D, outputs of the panel's type or undefined
  int64_t rows;                // that take part
  const Tensor &dx, &dw;       // undefined where not wanted
};

template <class Device, class RowLoss>
void over_chunks(const Device& device, const LinearModel& m, int64_t most, const Tensor& panel, RowLoss& loss) {
  for (int64_t begin = 0; begin < m.rows; begin += most) {
    const Chunk c = {begin, std::min(most, m.rows - begin)};
    const Tensor x = loss.read(m.x, c), predictions = rows_from(panel, 0, c.rows);
    multiply(device, x, transpose(m.w), predictions, m.bias);
    const Tensor slopes = loss.turn(c, predictions);
    if (!slopes.defined() || loss.multiply_slopes(c, x, slopes)) continue;
    if (m.dx.defined()) {  // may have the type of dW's sum, and is multiplied by whoever multiplies that
      const Tensor dx = loss.to_write(m.dx, c);
      multiply(device, slopes, m.w, dx, {}, Sum::first);
      loss.written(m.dx, c, dx);
    }
    if (m.dw.defined()) multiply(device, transpose(slopes), x, m.dw, {}, begin > 0 ? Sum::next : Sum::first);
  }
}

}  // namespace rf
