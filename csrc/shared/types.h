// Plain types that the kernels and their callers share. No torch, no intrinsics.
#pragma once
#include <cstdint>

namespace rf {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Neighbours along K, which some CPUs multiply with one instruction.
struct bf16x2 {
  bf16 first, second;
};

// The dtypes that have kernels: our name, an element's type, Python's name and torch's. This list and those below are
// the only ones: whatever there is for each, Python's regfast._C.DTYPES among it, is made from them.
#define RF_EACH_DTYPE(what, with)                                                 \
  what(f32, float, float32, Float, with) what(f64, double, float64, Double, with) \
      what(bf16, bf16, bfloat16, BFloat16, with) what(f16, f16, float16, Half, with)
#define RF_NAME(name, ...) name,
enum class DType { RF_EACH_DTYPE(RF_NAME, ) };
#define RF_PYTHON_NAME(name, type, python, ...) #python,
constexpr const char* kDTypeNames[] = {RF_EACH_DTYPE(RF_PYTHON_NAME, )};
#undef RF_PYTHON_NAME
constexpr int kDTypes = sizeof(kDTypeNames) / sizeof(*kDTypeNames);
constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The type that arithmetic on T is done in: half types compute in float and are rounded once, when stored.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulator<T>::type;
constexpr DType acc_dtype(DType t) { return t == DType::f64 ? t : DType::f32; }
constexpr int64_t acc_size(DType t) { return size_of(acc_dtype(t)); }

// What the derivative of an activation is computed from.
enum class Saved { nothing, output, preactivation };

#define RF_EACH_ACTIVATION(what)                                                                  \
  what(none, nothing) what(relu, output) what(gelu, preactivation) what(gelu_tanh, preactivation) \
      what(silu, preactivation) what(sigmoid, output) what(tanh, output)
#define RF_TEXT(name, ...) #name,
#define RF_SAVED(name, saved) Saved::saved,
enum class Activation { RF_EACH_ACTIVATION(RF_NAME) };
constexpr const char* kActivationNames[] = {RF_EACH_ACTIVATION(RF_TEXT)};
constexpr Saved kSaved[] = {RF_EACH_ACTIVATION(RF_SAVED)};
#undef RF_SAVED
constexpr const char* name_of(Activation a) { return kActivationNames[(int)a]; }
constexpr Saved saved_for(Activation a) { return kSaved[(int)a]; }

// Likelihoods of the exponential family with a linear model's prediction as their parameter. squared is a gaussian
// without its constants: (prediction - target)^2.
#define RF_EACH_FAMILY(what) what(squared) what(gaussian) what(bernoulli) what(poisson)
enum class Family { RF_EACH_FAMILY(RF_NAME) };
constexpr const char* kFamilyNames[] = {RF_EACH_FAMILY(RF_TEXT)};
#undef RF_TEXT
#undef RF_NAME

// The outputs of cross_entropy as bits, in the order in which ops return them.
enum CrossEntropyOutput : int64_t {
  kOutputLoss = 1,
  kOutputLse = 2,
  kOutputEntropy = 4,
  kOutputLogprob = 8,
  kOutputArgmax = 16
};

// A row's statistics as rows of the tensor that is saved for backward; the later ones exist only where they are needed.
enum CrossEntropyStat { kMax, kLogSum, kEntropy, kMass, kTargetMass };
constexpr int64_t cross_entropy_stat_rows(bool probabilities, bool entropy) {
  return probabilities ? 5 : entropy ? 3 : 2;
}

// Rows of a tensor whose class (or reduced) dimension lies anywhere: row r starts at
// (r / inner) * outer_stride + (r % inner) * inner_stride and its elements are class_stride apart.
struct RowLayout {
  int64_t inner, outer_stride, inner_stride, class_stride;
  constexpr int64_t offset(int64_t r) const {
    return inner == 1 ? r * outer_stride : (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

// Rows one dimension deep as the inner dimension of a single outer step: then many of them are `inner` neighbours, and
// tiles of them can be transposed.
constexpr RowLayout as_inner_rows(const RowLayout& l, int64_t rows) {
  return l.inner == 1 ? RowLayout{rows, 0, l.outer_stride, l.class_stride} : l;
}

// A two-dimensional operand. Its rows may be a collapsed pair of dimensions, as in RowLayout; columns are col_stride
// apart.
struct MatrixView {
  const void* data;
  int64_t inner, outer_stride, row_stride, col_stride;
  constexpr int64_t row_offset(int64_t r) const {
    return inner == 1 ? r * outer_stride : (r / inner) * outer_stride + (r % inner) * row_stride;
  }
};

}  // namespace rf
