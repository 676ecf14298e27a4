// The ISA's table of kernels, made from the algorithms of its namespace. Included after its target region is closed.

#define RF_EACH_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<bf16>, kernel<f16>}

constexpr Kernels make_table(const char* isa) {
  constexpr int64_t f32_columns = kTileColumns<f32v>, f64_columns = kTileColumns<f64v>;
  return {
      isa,
      {kTile.rows, kTile.rows, kTile.rows, kTile.rows},
      {f32_columns, f64_columns, f32_columns, f32_columns},
      RF_EACH_DTYPE(softmax_forward),
      RF_EACH_DTYPE(softmax_backward),
      RF_EACH_DTYPE(logsumexp_forward),
      RF_EACH_DTYPE(logsumexp_backward),
      RF_EACH_DTYPE(cross_entropy_forward),
      RF_EACH_DTYPE(cross_entropy_backward),
      RF_EACH_DTYPE(activation_forward),
      RF_EACH_DTYPE(activation_backward),
      RF_EACH_DTYPE(mse_loss),
      RF_EACH_DTYPE(mse_loss_backward),
      RF_EACH_DTYPE(likelihood),
      RF_EACH_DTYPE(few_outputs),
      RF_EACH_DTYPE(pack_a),
      RF_EACH_DTYPE(pack_b),
      RF_EACH_DTYPE(widen_a),
      RF_EACH_DTYPE(gemm_block),
      RF_EACH_DTYPE(gemm_dot),
      RF_EACH_DTYPE(gemm_direct),
      RF_EACH_DTYPE(gemm_lanes),
      RF_EACH_DTYPE(gemm_lane_sums),
      RF_EACH_DTYPE(count_entries),
      RF_EACH_DTYPE(list_entries),
      RF_EACH_DTYPE(sparse_row_product),
      RF_EACH_DTYPE(mix_parts),
      RF_EACH_DTYPE(unmix_parts),
      RF_EACH_DTYPE(part_products),
      fma_gflops,
  };
}

#undef RF_EACH_DTYPE
