// Thin products by our own kernels: where a library spends its time on other things.
//
// Why not a library for a handful of rows. In bfloat16 its products cost 16 rows when they have one (round_up_rows),
// and on processors without bfloat16 instructions it converts or rearranges the weight first; in all dtypes it packs
// factors for shapes that are not these. Here such a product costs the reading of its weight. products.h says which
// products come here.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace dmoe {

// Which dimension of a product is a small one.
enum class Thin { kNot, kRows, kColumns, kSums };

// As mm_out(), of a product that is thin in the way given. `out` has contiguous rows and none of the three is empty;
// of the factors, the one that is not thin has contiguous rows or columns.
void multiply_thin(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate, Thin thin);

// The same where a row of the result may depend on that row of `a`, on `b` and on nothing else: not on how many rows
// there are, nor on which of them it is. Never a library's product, whose sums follow the shape of the whole, and never
// one of two kernels by the number of rows. `out` has contiguous rows.
void multiply_by_row(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

// The gradient of an expert without rows, which most are when few tokens choose; an element takes `item` bytes.
void fill_with_zeros(const Matrix& out, int64_t item);

}  // namespace dmoe
