// Which products go to our own kernels: thin ones, where a library spends its time on other things.
//
// Why not a library for a handful of rows. In bfloat16 its products cost 16 rows when they have one (round_up_rows),
// and on processors without bfloat16 instructions it converts or rearranges the weight first; in all dtypes it packs
// factors for shapes that are not these. Here such a product costs the reading of its weight.
//
// A product of few columns is the same thing transposed, and one with few numbers in its sums is a gradient of few
// rows: the factors of a low-rank adapter make all three.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace dmoe {

// Whether products of so many rows are few_rows.cpp's, and so are gradients of as few.
bool few_rows(int64_t rows, ScalarType dtype);

// How many rows to give multiply() where `rows` are needed, as round_up_rows(): thin products need no rounding.
inline int64_t rows_to_give(int64_t rows, ScalarType dtype) {
  return few_rows(rows, dtype) ? rows : round_up_rows(rows, dtype);
}
// The same for a result of so many columns.
int64_t rows_to_give(int64_t rows, int64_t columns, ScalarType dtype);
// The same of a weight gradient's sums, (rows, columns) its result.
int64_t sums_to_give(int64_t sums, int64_t rows, int64_t columns, ScalarType dtype);

// As mm_out(), whose comment says the rest: out = a @ b, or out += a @ b with accumulate. By shapes, layouts and the
// processor alone it is one of our kernels or mm_out() itself.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

// The same where a row of the result may depend on that row of `a`, on `b` and on nothing else: not on how many rows
// there are, nor on which of them it is. Never a library's product, whose sums follow the shape of the whole, and never
// one of two kernels by the number of rows. `out` has contiguous rows.
void multiply_by_row(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

}  // namespace dmoe
