// The structs of problems.h as text, member by member: std::cerr << problem. A kernel's test prints its call so where
// it fails. Not for the kernels' files, which are compiled for instruction sets that not every machine has.
#pragma once
#include <ostream>
#include <string_view>
#include <type_traits>

#include "shared/problems.h"

namespace rf {
namespace printing {

template <class T>
void print(std::ostream& to, const T& value) {
  if constexpr (std::is_same_v<T, bool>)
    to << (value ? "true" : "false");
  else
    to << value;
}

// "{a = 1, b = 2}" from "a, b" and the values.
template <class... Members>
std::ostream& print_members(std::ostream& to, std::string_view names, const Members&... members) {
  to << "{";
  const auto print_next = [&](const auto& value) {
    const auto end = names.find(',');
    to << names.substr(0, end) << " = ";
    print(to, value);
    if (end == names.npos) return;
    names.remove_prefix(end);
    to << ", ";
    names.remove_prefix(names.find_first_not_of(", "));
  };
  (print_next(members), ...);
  return to << "}";
}

}  // namespace printing

inline std::ostream& operator<<(std::ostream& to, Activation a) { return to << name_of(a); }
inline std::ostream& operator<<(std::ostream& to, Family f) { return to << kFamilyNames[(int)f]; }

// All of a struct's members, in order: the compiler finds one that is missing here.
#define RF_PRINTABLE(Struct, ...)                                                 \
  inline std::ostream& operator<<(std::ostream& printed, const Struct& problem) { \
    const auto& [__VA_ARGS__] = problem;                                          \
    return printing::print_members(printed, #__VA_ARGS__, __VA_ARGS__);           \
  }

RF_PRINTABLE(RowLayout, inner, outer_stride, inner_stride, class_stride)
RF_PRINTABLE(MatrixView, data, inner, outer_stride, row_stride, col_stride)
RF_PRINTABLE(SoftmaxProblem, input, grad, output, in, grad_in, out, classes, log, row_result, row_grad)
RF_PRINTABLE(CrossEntropyProblem, logits, layout, classes, target, probabilities, probability_layout, class_weight,
             ignore_index, label_smoothing, z_loss, logit_scale, softcap, row_max, row_log_sum, row_entropy, row_mass,
             row_target_mass)
RF_PRINTABLE(CrossEntropyOutputs, loss, lse, logprob, argmax)
RF_PRINTABLE(CrossEntropyBackward, loss, loss_stride, lse, entropy, logprob, grad_logits, grad_layout,
             grad_probabilities, grad_probability_layout)
RF_PRINTABLE(ActivationBackward, grad, saved, grad_layout, output, columns, activation)
RF_PRINTABLE(LikelihoodProblem, family, outputs, target, row_weight, grad, loss)
RF_PRINTABLE(GemmProblem, m, n, k, a, a_transposed, b, b_transposed, c, c_stride, bias, activation, preactivation,
             wide_a, wide_b, wide_c, accumulate, bias_rows, bias_stride)
RF_PRINTABLE(CombinePartsProblem, parts, to_parts, length, from, from_stride, coefficients, to)
RF_PRINTABLE(PartProductsProblem, of_parts, parts, length, of, with, with_stride, sums)
#undef RF_PRINTABLE

}  // namespace rf
