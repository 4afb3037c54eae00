// What one thread's multiply-add units do at most: the measure of every product.
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions that are inlined
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>

#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cpu_level.h"
#include "few_rows_bf16.h"
#include "few_rows_lanes.h"

namespace dmoe {
namespace {

constexpr int kSums = 12;  // independent of each other: more than the latency of a multiply-add times two units
constexpr int64_t kSteps = 200000;

// A number of all sums, which keeps the compiler from leaving them out.
template <int W>
DMOE_INLINE float spin(float factor) {
  few::Lanes<W> sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = few::Lanes<W>{} + factor * static_cast<float>(i);  // or some are left out
  const few::Lanes<W> left = few::Lanes<W>{} + factor, right = few::Lanes<W>{} + 0.5f;
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * left + right;
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += sums[i][0];
  return total;
}
float spin_portable(float factor) { return spin<4>(factor); }
#ifdef DMOE_X86_LEVELS
__attribute__((target("arch=x86-64-v3"))) float spin_avx2(float factor) { return spin<8>(factor); }
__attribute__((target("arch=x86-64-v4"))) float spin_avx512(float factor) { return spin<16>(factor); }
DMOE_AVX512_BF16 float spin_pairs(float factor) {
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(factor * static_cast<float>(i));
  const __m512i pairs = _mm512_set1_epi32(0x3c003c00);
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sums[i] = few::add_pairs(sums[i], pairs, pairs);
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += _mm512_cvtss_f32(sums[i]);
  return total;
}
#endif

// GFLOP/s of one thread. bfloat16 in its own instructions, where the processor has those of AVX-512; units for matrices
// (AMX), which a library uses, do more.
double multiply_add_limit(std::string dtype) {
  DMOE_CHECK(dtype == "float32" || dtype == "bfloat16", "multiply_add_limit: dtype: expected float32 or bfloat16, got ",
             dtype);
  float (*spinning)(float) = spin_portable;
  int64_t numbers = 4;  // that an instruction adds up
#ifdef DMOE_X86_LEVELS
  if (few::level() == few::Level::kAvx2) spinning = spin_avx2, numbers = 8;
  if (few::level() >= few::Level::kAvx512) spinning = spin_avx512, numbers = 16;
  if (few::level() == few::Level::kAvx512Bf16 && dtype == "bfloat16") spinning = spin_pairs, numbers = 32;
#endif
  double best = 0;
  volatile float kept = 0.999f;
  for (int turn = 0; turn < 10; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    kept = 0.999f + 0.0f * spinning(kept);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2e-9 * static_cast<double>(numbers * kSums * kSteps) / seconds);
  }
  return best;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CompositeExplicitAutograd, m) {
  m.impl("multiply_add_limit", TORCH_BOX(&dmoe::multiply_add_limit));
}
