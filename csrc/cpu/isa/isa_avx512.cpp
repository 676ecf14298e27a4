// AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later); the same with products of bf16 pairs (Cooper Lake, Zen 4 and
// later); and with squares of them (AMX: Sapphire Rapids and later). The compiler uses AVX512-BF16 and AMX for their
// intrinsics alone, which only the kernels for pairs call: a test disassembles this file and looks.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/isa/kernels.h"
#include "cpu/isa/target_region.h"
#include "cpu/kernels/prelude.h"

#if !defined(__clang__)  // gcc 12's own reductions read a deliberately undefined register
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
RF_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")

namespace rf::avx512 {
constexpr tuning::RegisterTile kTile = tuning::kTileAvx512;
#include "cpu/isa/simd_avx512.h"
#include "cpu/isa/algorithms.inl.h"
#include "cpu/kernels/gemm_amx.inl.h"
#include "cpu/kernels/gemm_pairs.inl.h"
}  // namespace rf::avx512

RF_END_TARGET

namespace rf::avx512 {
#include "cpu/isa/table.inl.h"
extern const Kernels table;
constexpr Kernels table = make_table("avx512", nullptr);
}  // namespace rf::avx512

namespace rf::avx512_bf16 {
using namespace avx512;
constexpr PairKernels pairs = {.mr = kTile.rows,
                               .nr = kPairColumns,
                               .step = 0,
                               .chain = tuning::kGemmChain,
                               .rows = tuning::kBlockRows,
                               .columns = tuning::kGroupColumns,
                               .pack_a = {pack_a_pairs<bf16>, pack_a_pairs<float>},
                               .pack_b = {pack_b_pairs<bf16>, pack_b_pairs<float>},
                               .lay_out_a = {lay_out_a_pairs<bf16>, lay_out_a_pairs<float>},
                               .gemm_block = {gemm_block_pairs<flushed_bf16>, gemm_block_pairs<float>},
                               .gemm_dot = gemm_dot_pairs};
extern const Kernels table;
constexpr Kernels table = make_table("avx512_bf16", &pairs);
}  // namespace rf::avx512_bf16

namespace rf::avx512_amx {
using namespace avx512;
constexpr PairKernels pairs = {.mr = kAmxTileRows,
                               .nr = kPairColumns,
                               .step = kSquare,
                               .chain = tuning::kAmxChain,
                               .rows = tuning::kAmxBlockRows,
                               .columns = tuning::kAmxGroupColumns,
                               .pack_a = {pack_a_amx<bf16>, pack_a_amx<float>},
                               .pack_b = {pack_b_pairs<bf16, true>, pack_b_pairs<float, true>},
                               .lay_out_a = {lay_out_a_amx<bf16>, lay_out_a_amx<float>},
                               .gemm_block = {gemm_block_amx<flushed_bf16>, gemm_block_amx<float>},
                               .gemm_dot = gemm_dot_pairs};
extern const Kernels table;
constexpr Kernels table = make_table("avx512_amx", &pairs);
}  // namespace rf::avx512_amx
#endif
