// The gradients of attention in half types by our products, while accelerate(products=True) lasts. ATen's kernel for
// the CPU multiplies one number at a time where there are no instructions for these types. The method is
// FlashAttention's (Dao et al. 2022, algorithm 4): scores are made again, block by block, from the queries and keys,
// with the logarithms of their sums that forward has left.
#include "shared/torch_api.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_native.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/ops/outputs.h"
#include "cpu/ops/products.h"
#include "cpu/tuning.h"

namespace rf {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// batch x heads x positions x features, of one type and one number of heads each.
bool is_ours(at::TensorList tensors) {
  const Tensor& first = tensors[0];
  for (const Tensor& t : tensors)
    if (!is_slow_half(t) || t.dim() != 4 || t.numel() == 0 || t.scalar_type() != first.scalar_type() ||
        t.size(0) != first.size(0) || t.size(1) != first.size(1) || t.size(3) != first.size(3))
      return false;
  return true;
}

// As attention's inputs mostly are: views of batch x positions x heads x features.
Tensor empty_of(const Tensor& t) {
  return empty_result({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
}

Gradients backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                   const Tensor& logsumexp, double dropout, bool causal, const std::optional<Tensor>& mask_,
                   std::optional<double> scale_) {
  const int64_t batches = query.size(0), heads = query.size(1), rows = query.size(2), keys = key.size(2);
  Tensor mask = mask_.value_or(Tensor());
  const int64_t scores[] = {batches, heads, rows, keys};
  if (!is_ours({query, key, value, grad, out}) || dropout != 0 || value.size(2) != keys ||
      logsumexp.scalar_type() != acc_type(query.scalar_type()) || logsumexp.sizes() != query.sizes().slice(0, 3) ||
      (mask.defined() && !(at::isFloatingType(mask.scalar_type()) && at::is_expandable_to(mask.sizes(), scores))))
    return at::native::_scaled_dot_product_flash_attention_cpu_backward(grad, query, key, value, out, logsumexp,
                                                                        dropout, causal, mask_, scale_);
  const Record record("attention_backward", {&query, &key, &value});
  if (mask.defined()) mask = mask.expand(scores);
  const double scale = scale_.value_or(1 / std::sqrt((double)query.size(3)));
  const auto acc = query.options().dtype(logsumexp.scalar_type());
  const Tensor grad_query = empty_of(query), grad_key = empty_of(key), grad_value = empty_of(value);

  const int64_t rows_at_once = std::clamp<int64_t>(tuning::kScores / keys, std::min(rows, tuning::kScoreRows), rows);
  const int64_t heads_at_once = std::clamp<int64_t>(tuning::kScores / (rows_at_once * keys), 1, heads);
  for (int64_t batch = 0; batch < batches; ++batch)
    for (int64_t head = 0; head < heads; head += heads_at_once) {
      const int64_t count = std::min(heads_at_once, heads - head);
      const auto part = [&](const Tensor& t) { return t.select(0, batch).narrow(0, head, count); };
      const Tensor q = part(query), k = part(key), v = part(value), dy = part(grad), y = part(out);
      const Tensor dk = at::zeros(k.sizes(), acc), dv = at::zeros(v.sizes(), acc), dq = part(grad_query);
      for (int64_t row = 0; row < rows; row += rows_at_once) {
        const int64_t some = std::min(rows_at_once, rows - row);
        const int64_t seen = causal ? std::min(keys, row + some) : keys;  // keys that none of these rows looks past
        const auto of_rows = [&](const Tensor& t) { return t.narrow(1, row, some); };
        const auto of_keys = [&](const Tensor& t) { return t.narrow(1, 0, seen); };
        const Tensor q_rows = of_rows(q), dy_rows = of_rows(dy);

        // p = softmax(scale q k^T + mask)
        Tensor p = at::empty({count, some, seen}, acc);
        multiply_batches(q_rows, of_keys(k).transpose(1, 2), p);
        p.mul_(scale);
        if (mask.defined()) p.add_(of_rows(part(mask)).narrow(2, 0, seen));
        p.sub_(of_rows(part(logsumexp)).unsqueeze(2)).exp_();
        if (causal) p.tril_(row);
        multiply_batches(p.transpose(1, 2), dy_rows, of_keys(dv), Sum::next);

        // The gradient of the scores: p (dy v^T - dy y), where the last is a number of each row.
        Tensor ds = at::empty(p.sizes(), acc);
        multiply_batches(dy_rows, of_keys(v).transpose(1, 2), ds);
        ds.sub_(dy_rows.to(acc.dtype()).mul_(of_rows(y)).sum(2, /*keepdim=*/true)).mul_(p).mul_(scale);
        multiply_batches(ds, of_keys(k), of_rows(dq));
        multiply_batches(ds.transpose(1, 2), q_rows, of_keys(dk), Sum::next);
      }
      part(grad_key).copy_(dk);
      part(grad_value).copy_(dv);
    }
  return {grad_query, grad_key, grad_value};
}

}  // namespace

void take_attention(torch::Library& kernels) {
  kernels.impl("_scaled_dot_product_flash_attention_for_cpu_backward", TORCH_FN(backward));
}

}  // namespace rf
