// Loops that the compiler vectorises, compiled once per instruction set and chosen when the library is loaded.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// One portable binary that still uses AVX2 or AVX-512 where the CPU has them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DMOE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DMOE_SIMD
#endif
#define DMOE_INLINE inline __attribute__((always_inline))

namespace dmoe {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// What sums are kept in.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

template <typename To, typename From>
DMOE_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

DMOE_INLINE double load(const double* p) { return *p; }
DMOE_INLINE float load(const float* p) { return *p; }
DMOE_INLINE float load(const BFloat16* p) {
  return bits_of<float>(static_cast<uint32_t>(bits_of<uint16_t>(*p)) << 16);
}
DMOE_INLINE float load(const Half* p) { return static_cast<float>(*p); }

DMOE_INLINE void store(double* p, double value) { *p = value; }
DMOE_INLINE void store(float* p, float value) { *p = value; }
DMOE_INLINE void store(BFloat16* p, float value) {  // to nearest, ties to even, without a branch: this one vectorises
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  const uint16_t result = value == value ? rounded : uint16_t{0x7fc0};
  std::memcpy(static_cast<void*>(p), &result, sizeof(result));
}
DMOE_INLINE void store(Half* p, float value) { *p = Half(value); }

}  // namespace dmoe
