// The tests, one function per file.
#pragma once

namespace test {

void test_faults();
void test_instructions();
void test_elementwise();
void test_softmax();
void test_cross_entropy();
void test_cross_entropy_edges();
void test_gemm();
void test_likelihood();
void test_phm();

}  // namespace test
