// Checks, counted. A failure prints what was being tested and the test goes on; a crash prints it too (main.cpp).
#pragma once
#include <cstdint>

namespace test {

extern int64_t passed, failed;

// What is being tested, as printf.
__attribute__((format(printf, 1, 2))) void describe(const char* format, ...);
const char* description();

__attribute__((format(printf, 2, 3))) bool check(bool ok, const char* format, ...);
#define CHECK(condition) test::check((condition), "%s:%d: %s", __FILE__, __LINE__, #condition)

// The tests, one function per file.
void test_conversions();
void test_math();
void test_softmax();
void test_logsumexp();
void test_cross_entropy();
void test_cross_entropy_edges();
void test_activation();
void test_mse_loss();
void test_linear_nll();
void test_sparse();
void test_phm_linear();
void test_gemm();
void test_gemm_engine();
void test_packing();

// Set by QUICK=1: fewer random cases, for emulated machines.
extern bool quick;
inline int fewer(int cases) { return quick ? (cases + 4) / 5 : cases; }

// How many threads run_parallel (threads.cpp) uses; 2 unless a test changes it.
extern int64_t threads;

}  // namespace test
