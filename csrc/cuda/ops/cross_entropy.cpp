// cross_entropy on a CUDA device. Nothing here waits for it.
#include "shared/torch_api.h"

#include "cuda/ops/ops.h"
#include "shared/cross_entropy_ops.h"

namespace rf::cuda {
namespace {

struct Tensors : CrossEntropyTensors<CrossEntropyRows> {
  Tensor weight_sum;
};

struct CudaCrossEntropy : Cuda {
  using Cuda::Cuda;
  static constexpr bool kSumsRows = true;

  static bool knows(const Tensor&, double) { return false; }

  Tensors tensors(const CrossEntropyOperands& given, const CrossEntropyOptions& o) const {
    Tensors t = {cross_entropy_tensors<CrossEntropyRows>(given, o), Tensor()};
    t.args.rows = t.rows;
    if (given.weight.has_value() && o.label_smoothing != 0) {
      t.weight_sum = t.weight.sum();
      t.args.class_weight_sum = t.weight_sum.const_data_ptr();
    }
    return t;
  }

  CrossEntropyTotal forward(const Tensors& t, const CrossEntropyOptions& o, const CrossEntropyOutputs& out,
                            OptionalType total_type) const {
    return with_results(t, o, out, total_type, [&](const CrossEntropyResults& r) {
      launch_cross_entropy_forward(t.dtype, t.args, r, stream);
    });
  }

  CrossEntropyTotal forward_backward(const Tensors& t, const CrossEntropyOptions& o, const CrossEntropyBackward& g,
                                     int64_t /*bytes*/, double upstream, at::ScalarType type) const {
    const Tensor losses = at::empty({t.rows}, like.options().dtype(acc_type(like.scalar_type())));
    CrossEntropyOutputs out = {};
    out.loss = losses.mutable_data_ptr();
    return with_results(t, o, out, type, [&](const CrossEntropyResults& r) {
      launch_cross_entropy_forward_backward(t.dtype, t.args, r, g.grad_logits, g.grad_layout, stream, upstream);
    });
  }

  void backward(const Tensors& t, const CrossEntropyBackward& g, int64_t /*bytes*/, const double* denominator,
                double unless) const {
    launch_cross_entropy_backward(t.dtype, t.args, {g, denominator, unless}, stream);
  }

 private:
  template <class Launch>
  CrossEntropyTotal with_results(const Tensors& t, const CrossEntropyOptions& o, const CrossEntropyOutputs& out,
                                 OptionalType total_type, Launch&& launch) const {
    CrossEntropyTotal total;
    // The mean's denominator, which a sum has no use for but a saved tensor has to hold something.
    total.denominator = at::empty({}, like.options().dtype(at::kDouble));
    Workspace workspace(cross_entropy_workspace(t.rows), like);
    CrossEntropyResults r = {};
    static_cast<CrossEntropyOutputs&>(r) = out;
    if (total_type) {
      r.total = (total.loss = at::empty({}, like.options().dtype(*total_type))).mutable_data_ptr();
      r.total_dtype = dtype_of(*total_type);
      r.mean = o.reduction == at::Reduction::Mean;
    }
    r.weight_sum = total.denominator.mutable_data_ptr<double>();
    r.workspace = workspace.data();
    launch(r);
    return total;
  }
};

}  // namespace

void register_cross_entropy(torch::Library& m) { rf::register_cross_entropy<CudaCrossEntropy>(m, architecture_in_use); }

}  // namespace rf::cuda
