// Between gemm.cu, which plans a product, and the files that hold its kernels.
#pragma once
#include "cuda/launch.h"

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

// Element by element every operand can be read; 16 bytes at a time those that are aligned for it.
enum class GemmLoad { elements, along_along, along_across, across_across };  // A's memory and B's

// How a product is computed: the kernels, the C tile of a block, and how K is divided.
struct GemmPlan {
  bool tensor_cores;  // else gemm_simt
  GemmLoad load;      // of the former
  int tile_m, tile_n;
  int64_t k_per_split;
  int splits;
};
GemmPlan gemm_plan(DType dtype, bool tf32, const Gemm& gemm);

void launch_gemm_sm80(DType dtype, const GemmTask& task, const GemmPlan& plan, cudaStream_t stream);
void launch_gemm_simt(DType dtype, const GemmTask& task, const GemmPlan& plan, cudaStream_t stream);

// False where Hopper's own kernel does not take the product: tensor maps need 16-byte alignment.
bool launch_gemm_sm90(DType dtype, const GemmTask& task, cudaStream_t stream);

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
