// What a block of a GEMM kernel is told: the operands, the tile of C that is its own, and what becomes of the sums.
#pragma once
#include "shared/types.h"

namespace rf::cuda {

// What becomes of the sums.
struct GemmOutput {
  void* c;
  int64_t c_stride;
  const void* bias;
  Activation activation;
  void* preactivation;
};

// A matrix with mn (rows of A, columns of B) on one side and k on the other; rows of memory run along k, or across it.
struct GemmOperand {
  MatrixView view;
  bool across_k;
  constexpr int64_t offset(int64_t mn, int64_t k) const {
    return across_k ? view.row_offset(k) + mn * view.col_stride : view.row_offset(mn) + k * view.col_stride;
  }
};

// The parameter of every GEMM kernel. Blocks along x are tiles of C, blocks along y are ranges of K: with more than one
// of them, sums go to partial[y][m][n] (acc) instead of C.
struct GemmTask {
  int64_t m, n, k, k_per_split;
  GemmOperand a, b;
  GemmOutput out;
  void* partial;
};

// A block's tile of C, in an order in which blocks that run together share rows of A and columns of B in L2: down
// kGroup tiles, then one to the right.
struct TilePosition {
  int64_t row, column;
};
template <int group>
constexpr TilePosition tile_position(int64_t index, int64_t tiles_m, int64_t tiles_n) {
  const int64_t first = index / (group * tiles_n) * group;
  const int64_t rows = tiles_m - first < group ? tiles_m - first : group, rest = index - first * tiles_n;
  return {first + rest % rows, rest / rows};
}

}  // namespace rf::cuda
