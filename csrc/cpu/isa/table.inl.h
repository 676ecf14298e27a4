// The ISA's table of kernels, made from the algorithms of its namespace. Included after its target region is closed.

#ifndef RF_INSTANCE  // `make kernel` has another, for a table of a few kernels: tests/kernels/few_kernels.h
#define RF_INSTANCE(name, type, python, torch, kernel) kernel<type>,
#endif
#define RF_KERNEL(kernel) {RF_EACH_DTYPE(RF_INSTANCE, kernel)}

constexpr Kernels make_table(const char* isa, const PairKernels* pairs) {
  constexpr int64_t f32_columns = kTileColumns<f32v>, f64_columns = kTileColumns<f64v>;
  constexpr int64_t f32_features = f32v::size > 1 ? f32v::size : 0, f64_features = f64v::size > 1 ? f64v::size : 0;
  return {
      isa,
      {f32v::size, f64v::size, f32v::size, f32v::size},
      {kTile.rows, kTile.rows, kTile.rows, kTile.rows},
      {f32_columns, f64_columns, f32_columns, f32_columns},
      {f32_features, f64_features, f32_features, f32_features},
      RF_KERNEL(softmax_forward),
      RF_KERNEL(softmax_backward),
      RF_KERNEL(logsumexp_forward),
      RF_KERNEL(logsumexp_backward),
      RF_KERNEL(cross_entropy_forward),
      RF_KERNEL(cross_entropy_backward),
      RF_KERNEL(cross_entropy_forward_backward),
      RF_KERNEL(activation_forward),
      RF_KERNEL(activation_backward),
      RF_KERNEL(mse_loss),
      RF_KERNEL(mse_loss_backward),
      RF_KERNEL(likelihood),
      RF_KERNEL(few_outputs),
      RF_KERNEL(pack_a),
      RF_KERNEL(pack_b),
      RF_KERNEL(widen_a),
      RF_KERNEL(gemm_block),
      RF_KERNEL(gemm_dot),
      RF_KERNEL(gemm_direct),
      RF_KERNEL(gemm_lanes),
      RF_KERNEL(gemm_lane_sums),
      RF_KERNEL(count_entries),
      RF_KERNEL(list_entries),
      RF_KERNEL(sparse_row_product),
      RF_KERNEL(mix_parts),
      RF_KERNEL(unmix_parts),
      RF_KERNEL(part_products),
      fma_gflops,
      pairs,
  };
}

#undef RF_KERNEL
#undef RF_INSTANCE
