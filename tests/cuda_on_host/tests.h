// The tests, one function per file.
#pragma once

namespace test {

void test_faults();
void test_instructions();
void test_activation();
void test_mse_loss();
void test_softmax();
void test_cross_entropy();
void test_cross_entropy_edges();
void test_gemm();
void test_linear_nll();
void test_phm_linear();

}  // namespace test
