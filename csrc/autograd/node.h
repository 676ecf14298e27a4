// An op in the graph of autograd: what backward needs, in members of their types. torch::autograd::Function keeps
// options in a dictionary under strings and copies each tensor through several vectors, which is most of a short call.
#pragma once
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/version.h>

#include "shared/torch_api.h"

namespace rf {

using torch::autograd::variable_list;

// What an op's backward is called with beside the upstream gradients, undefined where an output was not used.
template <class Op>
struct Recorded {
  const typename Op::Options& options;
  const variable_list& saved;
  const std::array<bool, Op::kInputs>& needs;  // whether an input's gradient is asked for

  // Of what the kernels return, which is not always undefined where nothing was asked for.
  variable_list wanted(const std::array<const Tensor*, Op::kInputs>& grads) const {
    variable_list result(Op::kInputs);
    for (int i = 0; i < Op::kInputs; ++i)
      if (needs[i]) result[i] = *grads[i];
    return result;
  }
};

// Op has the types and functions
//     struct Options { ...; auto members() const; };    as in flat.h
//     static constexpr int kInputs, kSaved;             inputs that may have a gradient, and tensors that are saved
//     static variable_list backward(const Recorded<Op>&, const variable_list& upstream);    a gradient for each input
template <class Op>
class OpNode final : public torch::autograd::Node {
 public:
  using Options = typename Op::Options;

  OpNode(torch::autograd::edge_list&& edges, const Options& options) : Node(std::move(edges)), options(options) {}

  void save(int place, const Tensor& t, bool is_output) { saved[place] = torch::autograd::SavedVariable(t, is_output); }

  variable_list apply(variable_list&& upstream) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const variable_list tensors = unpacked();
    const auto needs = needed();
    return backward(options, tensors, needs, upstream);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& s : saved) s.reset_data();
  }

  // Compiled autograd: options are part of a graph's key, and what it calls has them within.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect((uint64_t)typeid(Op).hash_code());
    args.collect(std::string(typeid(Op).name()));
    std::apply([&](const auto&... member) { (args.collect(member), ...); }, options.members());
    for (const auto& s : saved) args.collect(s, /*is_output=*/true);
  }

  variable_list apply_with_saved(const variable_list& upstream,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    namespace compiled = torch::dynamo::autograd;
    for (auto& s : saved) swapped.before(s);
    compiled::PackedArgs packed;
    packed.pack(unpacked());
    auto arguments = std::move(packed).vec();
    const auto call = [options = options, needs = needed()](const variable_list& grads,
                                                            const std::vector<c10::IValue>& packed_tensors) {
      return backward(options, compiled::PackedArgs(packed_tensors).unpack<variable_list>(), needs, grads);
    };
    const auto& python = compiled::getPyCompilerInterface();
    const auto name = python->bind_function(swapped.get_py_compiler(), typeid(Op).name(), call, {arguments[0].type()},
                                            /*is_custom_function=*/true, /*is_traceable=*/true);
    const auto metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    auto grads =
        python->call_function(swapped.get_py_compiler(), "apply_functional", name, upstream, arguments, metadata);
    for (auto& s : saved) swapped.after(s);
    return grads;
  }

 private:
  variable_list unpacked() {
    variable_list tensors;
    tensors.reserve(Op::kSaved);
    for (const auto& s : saved) tensors.push_back(s.unpack(getptr()));
    return tensors;
  }

  std::array<bool, Op::kInputs> needed() const {
    std::array<bool, Op::kInputs> needs;
    for (int i = 0; i < Op::kInputs; ++i) needs[i] = task_should_compute_output(i);
    return needs;
  }

  static variable_list backward(const Options& options, const variable_list& tensors,
                                const std::array<bool, Op::kInputs>& needs, const variable_list& upstream) {
    for (const Tensor& g : upstream)
      if (g.defined()) return Op::backward({options, tensors, needs}, upstream);
    return variable_list(Op::kInputs);
  }

  const Options options;
  std::array<torch::autograd::SavedVariable, Op::kSaved> saved;
};

// Puts the op that made `results` of `inputs`, under no key of autograd's, into the graph. Results of integers have no
// gradient.
template <class Op>
void record(at::ArrayRef<Tensor> results, const std::array<const Tensor*, Op::kInputs>& inputs,
            const std::array<const Tensor*, Op::kSaved>& saved, const typename Op::Options& options) {
  using namespace torch::autograd;
  edge_list edges;
  edges.reserve(Op::kInputs);
  for (const Tensor* t : inputs) edges.push_back(t->defined() ? impl::gradient_edge(*t) : Edge());
  OpNode<Op>* op;
  const auto make = [&] { return op = new OpNode<Op>(std::move(edges), options); };
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13  // nodes are an intrusive_ptr's since
  const std::shared_ptr<Node> node(make(), deleteNode);
#else
  const auto node = c10::intrusive_ptr<Node>::unsafe_steal_from_new(make());
#endif
  for (const Tensor& t : results) {
    if (at::isFloatingType(t.scalar_type()))
      set_history(t, node);
    else
      node->add_input_metadata(Node::undefined_input());
  }
  // After set_history: a result that is saved refers to its place among the node's, not to the node, in a circle.
  for (int i = 0; i < Op::kSaved; ++i) {
    if (!saved[i]->defined()) continue;
    const bool is_result =
        std::any_of(results.begin(), results.end(), [&](const Tensor& t) { return t.is_same(*saved[i]); });
    op->save(i, *saved[i], is_result);
  }
}

}  // namespace rf
