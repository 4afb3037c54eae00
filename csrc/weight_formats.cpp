// Decoding of quantised weights, by blocks of rows and columns that fit a cache.
//
// In 4 bits a group has 16 values at most: they are computed once for each group, rounded to the result's dtype, and
// looked up by shuffles of registers. So decoding costs a few instructions for 16 or 32 values in every format, and
// rounds as the reference does.
#pragma GCC diagnostic ignored "-Wpsabi"                // vectors are passed between functions that are inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics
#include "weight_formats.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu_level.h"
#include "few_rows_lanes.h"

namespace dmoe {
namespace {

using few::Bits;
using few::HalfBits;
using few::Lanes;
using few::LanesOf;
using few::Level;
using few::level;

constexpr float kNf4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
constexpr float kE2m1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

void values_of_codes(WeightFormat format, bool with_zeros, float* to) {
  for (int code = 0; code < 16; ++code) {
    if (format == WeightFormat::kInt4) {
      to[code] = static_cast<float>(with_zeros ? code : code - 8);
    } else {
      to[code] = format == WeightFormat::kNf4 ? kNf4[code] : kE2m1[code];
    }
  }
}

// `count` scales or zero points from number `first` on, as float32.
void load_scales(const void* from, ScalarType dtype, int64_t first, int64_t count, float* to) {
  const auto convert = [&](const auto* p) {
    for (int64_t i = 0; i < count; ++i) to[i] = load(p + first + i);
  };
  switch (dtype) {
    case ScalarType::Float: return convert(static_cast<const float*>(from));
    case ScalarType::BFloat16: return convert(static_cast<const BFloat16*>(from));
    case ScalarType::Half: return convert(static_cast<const Half*>(from));
    default: break;
  }
  const auto* codes = static_cast<const uint8_t*>(from) + first;  // e8m0
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t exponent = codes[i];
    to[i] = exponent == 255 ? std::numeric_limits<float>::quiet_NaN()
                            : bits_of<float>(exponent == 0 ? uint32_t{0x00400000} : exponent << 23);
  }
}

// ------------------------------------------------------------------------------------------------------------ 4 bits

#ifdef DMOE_X86_LEVELS
using Bytes = LanesOf<uint8_t, 16>::type;

DMOE_INLINE Bytes load_bytes(const void* p) {
  Bytes out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

// 32 codes, of 16 bytes, looked up among 16 numbers of 4 bytes.
template <int W>
DMOE_INLINE void look_up(const uint8_t* codes, const float* table, float* to) {
  if constexpr (W == 16) {
    const Lanes<16> values = few::load_lanes<16>(table);
    const Bits<16> words = __builtin_convertvector(load_bytes(codes), Bits<16>);
    const Lanes<16> even = __builtin_shuffle(values, (LanesOf<int32_t, 16>::type)(words & 15));
    const Lanes<16> odd = __builtin_shuffle(values, (LanesOf<int32_t, 16>::type)(words >> 4));
    constexpr LanesOf<int32_t, 16>::type kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    few::store_lanes<16>(to, __builtin_shuffle(even, odd, kLow));
    few::store_lanes<16>(to + 16, __builtin_shuffle(even, odd, kLow + 8));
  } else {
    const Lanes<8> below = few::load_lanes<8>(table), above = few::load_lanes<8>(table + 8);
    for (int half = 0; half < 2; ++half, codes += 8, to += 16) {
      LanesOf<uint8_t, 8>::type bytes;
      std::memcpy(&bytes, codes, sizeof(bytes));
      const Bits<8> words = __builtin_convertvector(bytes, Bits<8>);
      const Lanes<8> even = __builtin_shuffle(below, above, (LanesOf<int32_t, 8>::type)(words & 15));
      const Lanes<8> odd = __builtin_shuffle(below, above, (LanesOf<int32_t, 8>::type)(words >> 4));
      constexpr LanesOf<int32_t, 8>::type kLow = {0, 8, 1, 9, 2, 10, 3, 11};
      few::store_lanes<8>(to, __builtin_shuffle(even, odd, kLow));
      few::store_lanes<8>(to + 8, __builtin_shuffle(even, odd, kLow + 4));
    }
  }
}

// The same of 2 bytes.
template <int W, typename T>
DMOE_INLINE void look_up_halves(const uint8_t* codes, const T* table, T* to) {
  if constexpr (W == 16) {
    HalfBits<32> values;
    std::memcpy(&values, table, 32);
    std::memcpy(reinterpret_cast<char*>(&values) + 32, table, 32);
    const Bits<16> words = __builtin_convertvector(load_bytes(codes), Bits<16>);
    const HalfBits<32> index = (HalfBits<32>)((words & 15) | (words >> 4) << 16);
    const HalfBits<32> found = __builtin_shuffle(values, index);
    std::memcpy(static_cast<void*>(to), &found, sizeof(found));
  } else {
    // Tables of the lower and of the upper bytes.
    constexpr Bytes kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    constexpr Bytes kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Bytes first = load_bytes(table), second = load_bytes(table + 8), bytes = load_bytes(codes);
    const Bytes lower = __builtin_shuffle(first, second, kEven), upper = __builtin_shuffle(first, second, kEven + 1);
    const Bytes even = bytes & 15, odd = bytes >> 4;
    for (int half = 0; half < 2; ++half) {
      const Bytes index = half ? __builtin_shuffle(even, odd, kLow + 8) : __builtin_shuffle(even, odd, kLow);
      const Bytes low = __builtin_shuffle(lower, index), high = __builtin_shuffle(upper, index);
      const Bytes found[] = {__builtin_shuffle(low, high, kLow), __builtin_shuffle(low, high, kLow + 8)};
      std::memcpy(static_cast<void*>(to + half * 16), found, sizeof(found));
    }
  }
}
#endif

// W is 16 or 8 where shuffles look numbers up, else 1.
template <int W, typename T>
DMOE_INLINE void decode_group(const uint8_t* codes, const float* values, float scale, float zero, int64_t columns,
                              T* to) {
  alignas(64) T table[16];
  for (int code = 0; code < 16; ++code) {
    const float value = (values[code] - zero) * scale;
    if constexpr (std::is_same_v<T, double>) {
      table[code] = static_cast<double>(value);
    } else {
      store(table + code, value);
    }
  }
  for (int64_t column = 0; column < columns; column += kDecodeStep, codes += kDecodeStep / 2, to += kDecodeStep) {
#ifdef DMOE_X86_LEVELS
    if constexpr (W > 1 && std::is_same_v<T, float>) {
      look_up<W>(codes, table, to);
      continue;
    } else if constexpr (W > 1 && sizeof(T) == 2) {
      look_up_halves<W>(codes, table, to);
      continue;
    }
#endif
    for (int64_t i = 0; i < kDecodeStep / 2; ++i) {
      to[2 * i] = table[codes[i] & 15];
      to[2 * i + 1] = table[codes[i] >> 4];
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ 8 bits

// Without a branch, so that it vectorises; its subnormal numbers are normal ones of float32.
DMOE_INLINE float e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7f, sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t normal = (magnitude << 20) + (uint32_t{120} << 23);  // from bias 7 to 127
  const uint32_t subnormal = bits_of<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  const uint32_t real = magnitude < 8 ? subnormal : normal;
  return bits_of<float>((magnitude == 0x7f ? uint32_t{0x7fc00000} : real) | sign);
}

template <bool kFloat, typename T>
DMOE_INLINE void decode_segment(const uint8_t* codes, float scale, int64_t columns, T* to) {
  for (int64_t column = 0; column < columns; ++column) {
    float value;
    if constexpr (kFloat) {
      value = e4m3(codes[column]);
    } else {
      value = static_cast<float>(static_cast<int8_t>(codes[column]));
    }
    value *= scale;
    if constexpr (std::is_same_v<T, double>) {
      to[column] = static_cast<double>(value);
    } else {
      store(to + column, value);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- blocks

struct Block {
  int64_t first_row, end_row, first_column, end_column;
};

template <int W, typename T>
DMOE_INLINE void decode(const QuantizedMatrix& weight, const Block& block, float* scales, float* zeros, T* to) {
  const bool four_bits = has_four_bits(weight.format);
  const int64_t across = (weight.columns + weight.block_columns - 1) / weight.block_columns;
  const int64_t first = block.first_column / weight.block_columns;
  const int64_t count = (block.end_column + weight.block_columns - 1) / weight.block_columns - first;
  const int64_t row_bytes = four_bits ? weight.columns / 2 : weight.columns;
  float values[16];
  if (four_bits) values_of_codes(weight.format, weight.zeros != nullptr, values);
  for (int64_t row = block.first_row; row < block.end_row; ++row) {
    if (row == block.first_row || row % weight.block_rows == 0) {
      const int64_t at = row / weight.block_rows * across + first;
      load_scales(weight.scales, weight.scales_dtype, at, count, scales);
      if (weight.zeros != nullptr) load_scales(weight.zeros, weight.zeros_dtype, at, count, zeros);
    }
    const uint8_t* codes = weight.codes + row * row_bytes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = std::max(block.first_column, (first + i) * weight.block_columns);
      const int64_t columns = std::min(block.end_column, (first + i + 1) * weight.block_columns) - begin;
      if (four_bits) {
        decode_group<W>(codes + begin / 2, values, scales[i], zeros[i], columns, to);
      } else if (weight.format == WeightFormat::kFp8) {
        decode_segment<true>(codes + begin, scales[i], columns, to);
      } else {
        decode_segment<false>(codes + begin, scales[i], columns, to);
      }
      to += columns;
    }
  }
}

#ifdef DMOE_X86_LEVELS
template <typename T>
__attribute__((target("arch=x86-64-v4"))) void decode_avx512(const QuantizedMatrix& weight, const Block& block,
                                                             float* scales, float* zeros, T* to) {
  decode<16, T>(weight, block, scales, zeros, to);
}
template <typename T>
__attribute__((target("arch=x86-64-v3"))) void decode_avx2(const QuantizedMatrix& weight, const Block& block,
                                                           float* scales, float* zeros, T* to) {
  decode<8, T>(weight, block, scales, zeros, to);
}
#endif

template <typename T>
void decode_as(const QuantizedMatrix& weight, const Block& block, float* scales, float* zeros, void* memory) {
  T* to = static_cast<T*>(memory);
#ifdef DMOE_X86_LEVELS
  if (level() >= Level::kAvx512) return decode_avx512<T>(weight, block, scales, zeros, to);
  if (level() == Level::kAvx2) return decode_avx2<T>(weight, block, scales, zeros, to);
#endif
  decode<1, T>(weight, block, scales, zeros, to);
}

}  // namespace

void decode_block(const QuantizedMatrix& weight, int64_t first_row, int64_t end_row, int64_t first_column,
                  int64_t end_column, void* to, ScalarType dtype) {
  if (first_row >= end_row || first_column >= end_column) return;
  const Block block{first_row, end_row, first_column, end_column};
  const int64_t most = (end_column - first_column) / weight.block_columns + 2;
  std::vector<float> scales(2 * most, 0.0f);
  float* zeros = scales.data() + most;  // stay 0 where there are none
  switch (dtype) {
    case ScalarType::Float: return decode_as<float>(weight, block, scales.data(), zeros, to);
    case ScalarType::Double: return decode_as<double>(weight, block, scales.data(), zeros, to);
    case ScalarType::BFloat16: return decode_as<BFloat16>(weight, block, scales.data(), zeros, to);
    default: return decode_as<Half>(weight, block, scales.data(), zeros, to);
  }
}

}  // namespace dmoe
