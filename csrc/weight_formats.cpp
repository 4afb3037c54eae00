// Decoding of quantised weights, by blocks of rows and columns that fit a cache.
//
// In 4 bits a group has 16 values at most: they are computed once for each group, rounded to the result's dtype, and
// looked up by shuffles of registers: a few instructions for 32 values, whatever the format.
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
#include "dispatch.h"
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

// W bytes as words. In two steps: the compiler takes one of a factor of four apart, number by number.
template <int W>
DMOE_INLINE Bits<W> load_words(const uint8_t* p) {
  typename LanesOf<uint8_t, W>::type bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, HalfBits<W>), Bits<W>);
}

// ------------------------------------------------------------------------------------------------------------ 4 bits

// The numbers that the 16 codes of a group stand for; W is 16 or 8 where shuffles look them up, else 4.
template <int W, typename T, typename = void>
struct Table {
  T numbers[16];

  DMOE_INLINE Table(const float* values, float scale, float zero) {
    for (int code = 0; code < 16; ++code) {
      const float value = (values[code] - zero) * scale;
      if constexpr (std::is_same_v<T, double>) {
        numbers[code] = value;
      } else {
        store(numbers + code, value);
      }
    }
  }
  // Those of kDecodeStep codes.
  DMOE_INLINE void look_up(const uint8_t* codes, T* to) const {
    for (int64_t i = 0; i < kDecodeStep / 2; ++i) {
      to[2 * i] = numbers[codes[i] & 15];
      to[2 * i + 1] = numbers[codes[i] >> 4];
    }
  }
};

#ifdef DMOE_X86_LEVELS
template <int W>
using Index = typename LanesOf<int32_t, W>::type;
using Bytes = LanesOf<uint8_t, 16>::type;

template <int W>
DMOE_INLINE Lanes<W> scaled(const float* values, float scale, float zero) {
  return (few::load_lanes<W>(values) - zero) * scale;
}
// Eight or sixteen numbers in two bytes each.
template <int W, typename T>
DMOE_INLINE HalfBits<W> halves(const Lanes<W>& value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return few::bfloat16_bits<W>(value);
  } else {
    T rounded[W];
    few::store_lanes<W>(rounded, value);
    HalfBits<W> out;
    std::memcpy(&out, rounded, sizeof(out));
    return out;
  }
}

template <>
struct Table<16, float> {
  Lanes<16> numbers;

  DMOE_INLINE Table(const float* values, float scale, float zero) : numbers(scaled<16>(values, scale, zero)) {}
  DMOE_INLINE void look_up(const uint8_t* codes, float* to) const {
    const Bits<16> words = load_words<16>(codes);
    const Lanes<16> even = __builtin_shuffle(numbers, (Index<16>)(words & 15));
    const Lanes<16> odd = __builtin_shuffle(numbers, (Index<16>)(words >> 4));
    constexpr Index<16> kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    few::store_lanes<16>(to, __builtin_shuffle(even, odd, kLow));
    few::store_lanes<16>(to + 16, __builtin_shuffle(even, odd, kLow + 8));
  }
};
template <>
struct Table<8, float> {
  Lanes<8> below, above;

  DMOE_INLINE Table(const float* values, float scale, float zero)
      : below(scaled<8>(values, scale, zero)), above(scaled<8>(values + 8, scale, zero)) {}
  DMOE_INLINE void look_up(const uint8_t* codes, float* to) const {
    for (int half = 0; half < 2; ++half, codes += 8, to += 16) {
      const Bits<8> words = load_words<8>(codes);
      const Lanes<8> even = __builtin_shuffle(below, above, (Index<8>)(words & 15));
      const Lanes<8> odd = __builtin_shuffle(below, above, (Index<8>)(words >> 4));
      constexpr Index<8> kLow = {0, 8, 1, 9, 2, 10, 3, 11};
      few::store_lanes<8>(to, __builtin_shuffle(even, odd, kLow));
      few::store_lanes<8>(to + 8, __builtin_shuffle(even, odd, kLow + 4));
    }
  }
};
template <typename T>
struct Table<16, T, std::enable_if_t<sizeof(T) == 2>> {
  HalfBits<32> numbers;  // each twice

  DMOE_INLINE Table(const float* values, float scale, float zero) {
    const HalfBits<16> once = halves<16, T>(scaled<16>(values, scale, zero));
    const Bits<16> words = __builtin_convertvector(once, Bits<16>);
    numbers = (HalfBits<32>)(words | words << 16);
  }
  DMOE_INLINE void look_up(const uint8_t* codes, T* to) const {
    const Bits<16> words = load_words<16>(codes);
    const HalfBits<32> index = (HalfBits<32>)((words & 15) << 1 | (words & 0xf0) << 13);
    const HalfBits<32> found = __builtin_shuffle(numbers, index);
    std::memcpy(static_cast<void*>(to), &found, sizeof(found));
  }
};
template <typename T>
struct Table<8, T, std::enable_if_t<sizeof(T) == 2>> {
  Bytes lower, upper;  // of each

  DMOE_INLINE Table(const float* values, float scale, float zero) {
    constexpr Bytes kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const Bytes first = (Bytes)halves<8, T>(scaled<8>(values, scale, zero));
    const Bytes second = (Bytes)halves<8, T>(scaled<8>(values + 8, scale, zero));
    lower = __builtin_shuffle(first, second, kEven), upper = __builtin_shuffle(first, second, kEven + 1);
  }
  DMOE_INLINE void look_up(const uint8_t* codes, T* to) const {
    constexpr Bytes kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    Bytes bytes;
    std::memcpy(&bytes, codes, sizeof(bytes));
    const Bytes even = bytes & 15, odd = bytes >> 4;
    const Bytes indices[] = {__builtin_shuffle(even, odd, kLow), __builtin_shuffle(even, odd, kLow + 8)};
    for (int half = 0; half < 2; ++half, to += 16) {
      const Bytes low = __builtin_shuffle(lower, indices[half]), high = __builtin_shuffle(upper, indices[half]);
      const Bytes found[] = {__builtin_shuffle(low, high, kLow), __builtin_shuffle(low, high, kLow + 8)};
      std::memcpy(static_cast<void*>(to), found, sizeof(found));
    }
  }
};
#endif

template <int W, typename T>
DMOE_INLINE void decode_group(const uint8_t* codes, const float* values, float scale, float zero, int64_t columns,
                              T* to) {
  const Table<W, T> table(values, scale, zero);
  for (int64_t column = 0; column < columns; column += kDecodeStep) {
    table.look_up(codes + column / 2, to + column);
  }
}

// ------------------------------------------------------------------------------------------------------------ 8 bits

template <bool kFloat, int W>
DMOE_INLINE Lanes<W> values_of(const uint8_t* codes) {
  using Integers = typename LanesOf<int32_t, W>::type;
  const Bits<W> code = load_words<W>(codes);
  if constexpr (!kFloat) {
    return __builtin_convertvector((Integers)(code << 24) >> 24, Lanes<W>);
  } else {  // subnormal numbers are normal ones of float32, and 0x7f is NaN
    const Bits<W> magnitude = code & 0x7f;
    const Bits<W> normal = (magnitude << 20) + (120u << 23);  // from bias 7 to 127
    const Bits<W> subnormal = (Bits<W>)(__builtin_convertvector((Integers)magnitude, Lanes<W>) * 0x1p-9f);
    const Bits<W> small = (Bits<W>)(magnitude < 8), special = (Bits<W>)(magnitude == 0x7f) & 0x7fc00000u;
    return (Lanes<W>)((subnormal & small) | (normal & ~small) | special | (code & 0x80) << 24);
  }
}

template <bool kFloat, int W, typename T>
DMOE_INLINE void decode_segment(const uint8_t* codes, float scale, int64_t columns, T* to) {
  const auto decode = [&](const uint8_t* from, T* out) __attribute__((always_inline)) {
    const Lanes<W> value = values_of<kFloat, W>(from) * scale;
    if constexpr (std::is_same_v<T, double>) {
      for (int i = 0; i < W; ++i) out[i] = value[i];
    } else {
      few::store_lanes<W>(out, value);
    }
  };
  int64_t column = 0;
  for (; column + W <= columns; column += W) decode(codes + column, to + column);
  if (column < columns) {
    uint8_t rest[W] = {};
    T numbers[W];
    std::memcpy(rest, codes + column, columns - column);
    decode(rest, numbers);
    std::copy(numbers, numbers + (columns - column), to + column);
  }
}

// ------------------------------------------------------------------------------------------------------------- blocks

constexpr int64_t kRowsAhead = 16;

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
  const int64_t first_byte = block.first_column * row_bytes / weight.columns;
  const int64_t bytes = block.end_column * row_bytes / weight.columns - first_byte;
  const bool part = bytes < row_bytes;
  float values[16];
  if (four_bits) values_of_codes(weight.format, weight.zeros != nullptr, values);
  for (int64_t row = block.first_row; row < block.end_row; ++row) {
    if (row == block.first_row || row % weight.block_rows == 0) {
      const int64_t at = row / weight.block_rows * across + first;
      load_scales(weight.scales, weight.scales_dtype, at, count, scales);
      if (weight.zeros != nullptr) load_scales(weight.zeros, weight.zeros_dtype, at, count, zeros);
    }
    const uint8_t* codes = weight.codes + row * row_bytes;
    if (part) {  // of rows that lie too far apart for the processor to see a stream
      const uint8_t* ahead = weight.codes + std::min(row + kRowsAhead, block.end_row - 1) * row_bytes + first_byte;
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = std::max(block.first_column, (first + i) * weight.block_columns);
      const int64_t columns = std::min(block.end_column, (first + i + 1) * weight.block_columns) - begin;
      if (four_bits) {
        decode_group<W>(codes + begin / 2, values, scales[i], zeros[i], columns, to);
      } else if (weight.format == WeightFormat::kFp8) {
        decode_segment<true, W>(codes + begin, scales[i], columns, to);
      } else {
        decode_segment<false, W>(codes + begin, scales[i], columns, to);
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
  decode<4, T>(weight, block, scales, zeros, to);
}

}  // namespace

void decode_block(const QuantizedMatrix& weight, int64_t first_row, int64_t end_row, int64_t first_column,
                  int64_t end_column, void* to, ScalarType dtype) {
  if (first_row >= end_row || first_column >= end_column) return;
  const Block block{first_row, end_row, first_column, end_column};
  const int64_t most = (end_column - first_column) / weight.block_columns + 2;
  std::vector<float> scales(2 * most, 0.0f);
  float* zeros = scales.data() + most;  // stay 0 where there are none
  with_floating(dtype, [&](auto zero) { decode_as<decltype(zero)>(weight, block, scales.data(), zeros, to); });
}

}  // namespace dmoe
