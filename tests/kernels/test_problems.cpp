// Arguments as text, which a failing test shows.
#include <sstream>
#include <string>

#include "check.h"

namespace test {

TEST(problems_as_text) {
  describe("problems as text");
  const rf::GemmProblem gemm = {.m = 2, .n = 3, .k = 5, .b_transposed = true, .activation = rf::Activation::gelu_tanh};
  const rf::LikelihoodProblem likelihood = {.family = rf::Family::poisson, .outputs = 7};
  {
    const With outer(likelihood), inner(gemm);
    std::ostringstream text;
    With::print_all(text);
    CHECK(text.str() ==
          "  with {m = 2, n = 3, k = 5, a = {data = 0, inner = 0, outer_stride = 0, row_stride = 0, col_stride = 0}, "
          "a_transposed = false, b = {data = 0, inner = 0, outer_stride = 0, row_stride = 0, col_stride = 0}, "
          "b_transposed = true, c = 0, c_stride = 0, bias = 0, activation = gelu_tanh, preactivation = 0, "
          "wide_a = false, wide_b = false, wide_c = false, accumulate = false, bias_rows = 1, bias_stride = 0}\n"
          "  with {family = poisson, outputs = 7, target = 0, row_weight = 0, grad = 0, loss = 0}\n");
  }
  std::ostringstream nothing;
  With::print_all(nothing);
  CHECK(nothing.str().empty());
}

}  // namespace test
