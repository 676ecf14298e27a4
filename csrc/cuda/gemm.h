// Between gemm.cu, which plans a product, and the files that hold its kernels.
#pragma once
#include "cuda/device/gemm_task.h"
#include "cuda/launch.h"

namespace rf::cuda {

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

// The product as its kernel is told of it, with K whole.
GemmTask gemm_task(const Gemm& gemm);

void launch_gemm_sm80(DType dtype, const GemmTask& task, const GemmPlan& plan, cudaStream_t stream);
void launch_gemm_simt(DType dtype, const GemmTask& task, const GemmPlan& plan, cudaStream_t stream);

// False where Hopper's own kernel does not take the product: tensor maps need 16-byte alignment.
bool launch_gemm_sm90(DType dtype, const GemmTask& task, cudaStream_t stream);

}  // namespace rf::cuda
