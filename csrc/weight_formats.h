// Quantised weights: dmoe/ops/weight_formats.py says what the formats mean; a block of one is decoded here.
#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

namespace dmoe {

enum class WeightFormat { kInt8, kFp8, kInt4, kNf4, kMxfp4 };

inline bool has_four_bits(WeightFormat format) { return format != WeightFormat::kInt8 && format != WeightFormat::kFp8; }

// One expert's matrix (rows, columns): codes row after row, two to a byte in 4 bits, the lower one first.
struct QuantizedMatrix {
  WeightFormat format;
  const uint8_t* codes;
  const void *scales, *zeros;  // row after row of blocks; zeros may be null
  torch::headeronly::ScalarType scales_dtype, zeros_dtype;
  int64_t columns, block_rows, block_columns;
};

// In 4 bits a block of columns begins and ends at multiples of so many, and groups are multiples of it.
constexpr int64_t kDecodeStep = 32;

// Decodes rows [first_row, end_row), columns [first_column, end_column) into dense rows of `dtype`: float32, float64,
// bfloat16 or float16. Runs on the caller's thread.
void decode_block(const QuantizedMatrix& weight, int64_t first_row, int64_t end_row, int64_t first_column,
                  int64_t end_column, void* to, torch::headeronly::ScalarType dtype);

}  // namespace dmoe
