// Which products go to our own kernels: those of few rows, where a library spends its time on other things.
//
// Why not a library for a handful of rows. In bfloat16 its products cost 16 rows when they have one (round_up_rows), and
// on processors without bfloat16 instructions it converts or rearranges the weight first; in all dtypes it packs factors
// for shapes that are not these. Here such a product costs the reading of its weight.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace dmoe {

// Whether products of so many rows, or sums over so many, are few_rows.cpp's.
bool few_rows(int64_t rows, ScalarType dtype);

// How many rows to give multiply() where `rows` are needed, as round_up_rows(): few need no rounding.
inline int64_t rows_to_give(int64_t rows, ScalarType dtype) {
  return few_rows(rows, dtype) ? rows : round_up_rows(rows, dtype);
}

// As mm_out(), whose comment says the rest: out = a @ b, or out += a @ b with accumulate. By shapes, layouts and the
// processor alone it is one of our kernels or mm_out() itself.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

}  // namespace dmoe
