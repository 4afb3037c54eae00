// Vectors of as many numbers as an instruction set takes at once, in the compiler's own extension: loads of every dtype
// as float32, stores back, and sums of lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

// Where kernels for several levels of x86 stand in one library, and the processor decides; as DMOE_SIMD has it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DMOE_X86_LEVELS 1
#endif

// Four numbers of two vectors of four.
#if defined(__clang__)
#define DMOE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DMOE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename LanesOf<int32_t, 4>::type{__VA_ARGS__})
#endif

namespace dmoe {
namespace few {

// W numbers that one instruction, or a few, works on.
template <typename S, int W>
struct LanesOf {
  typedef S type __attribute__((vector_size(W * sizeof(S))));
};
template <int W>
using Lanes = typename LanesOf<float, W>::type;
template <int W>
using Bits = typename LanesOf<uint32_t, W>::type;
template <int W>
using HalfBits = typename LanesOf<uint16_t, W>::type;

template <int W>
DMOE_INLINE Lanes<W> load_lanes(const float* p) {
  Lanes<W> out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
template <int W>
DMOE_INLINE Bits<W> load_halves(const void* p) {
  HalfBits<W> bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, Bits<W>);
}
template <int W>
DMOE_INLINE Lanes<W> load_lanes(const BFloat16* p) {
  return (Lanes<W>)(load_halves<W>(p) << 16);
}
template <int W>
DMOE_INLINE Lanes<W> load_lanes(const Half* p) {
  const Bits<W> bits = load_halves<W>(p), magnitude = (bits & 0x7fff) << 13;
  const Lanes<W> scaled = (Lanes<W>)magnitude * 0x1p112f;  // to float's bias; subnormal numbers become normal ones
  const Bits<W> special = (Bits<W>)(magnitude >= Bits<W>{} + 0x0f800000u) & 0x7f800000u;  // infinity, NaN
  return (Lanes<W>)((Bits<W>)scaled | special | (bits & 0x8000) << 16);
}

template <int W>
DMOE_INLINE void store_lanes(float* p, const Lanes<W>& value) {
  std::memcpy(p, &value, sizeof(value));
}
template <int W>
DMOE_INLINE HalfBits<W> bfloat16_bits(const Lanes<W>& value) {  // as store() in simd.h
  const Bits<W> bits = (Bits<W>)value;
  const Bits<W> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits<W> real = (Bits<W>)(value == value);
  return __builtin_convertvector((rounded & real) | (~real & 0x7fc0), HalfBits<W>);
}
template <int W>
DMOE_INLINE void store_lanes(BFloat16* p, const Lanes<W>& value) {
  const HalfBits<W> out = bfloat16_bits<W>(value);
  std::memcpy(static_cast<void*>(p), &out, sizeof(out));
}
template <int W>
DMOE_INLINE void store_lanes(Half* p, const Lanes<W>& value) {
  for (int i = 0; i < W; ++i) store(p + i, value[i]);
}

// The sum of both halves. From a copy: the compiler keeps in memory what it sees read in two ways.
template <int W>
DMOE_INLINE Lanes<W / 2> halve(const Lanes<W>& value) {
  const Lanes<W> copy = value;
  Lanes<W / 2> low, high;
  std::memcpy(&low, &copy, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&copy) + sizeof(low), sizeof(high));
  return low + high;
}

// The sums of the lanes of four vectors; each in the same order.
template <int W>
DMOE_INLINE Lanes<4> sum_four(const Lanes<W>& a, const Lanes<W>& b, const Lanes<W>& c, const Lanes<W>& d) {
  if constexpr (W > 4) {
    return sum_four<W / 2>(halve<W>(a), halve<W>(b), halve<W>(c), halve<W>(d));
  } else {
    const Lanes<4> ab = DMOE_SHUFFLE(a, b, 0, 4, 1, 5) + DMOE_SHUFFLE(a, b, 2, 6, 3, 7);
    const Lanes<4> cd = DMOE_SHUFFLE(c, d, 0, 4, 1, 5) + DMOE_SHUFFLE(c, d, 2, 6, 3, 7);
    return DMOE_SHUFFLE(ab, cd, 0, 1, 4, 5) + DMOE_SHUFFLE(ab, cd, 2, 3, 6, 7);
  }
}

}  // namespace few
}  // namespace dmoe
