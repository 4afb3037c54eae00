// Every product of the CPU half: which of three ways it goes, by its shape, its layout and the processor.
//
//   thin      few_rows.h: a few rows, a few columns, or sums of a few numbers: the time it takes to read the factors
//   blocked   blocked_gemm.h: our own kernels for everything larger
//   library   mm_out(): PyTorch's, which is MKL's or oneDNN's: where those were measured to be faster, and for float64
//
// A product of few columns is one of few rows transposed, and one with few numbers in its sums is a gradient of few rows:
// the factors of a low-rank adapter make all three.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace dmoe {

// How many rows to give multiply() where `rows` are needed: more only where the library takes them (round_up_rows()).
int64_t rows_to_give(int64_t rows, ScalarType dtype);
// The same for a result of so many columns.
int64_t rows_to_give(int64_t rows, int64_t columns, ScalarType dtype);
// The same of a weight gradient's sums, (rows, columns) its result.
int64_t sums_to_give(int64_t sums, int64_t rows, int64_t columns, ScalarType dtype);

// As mm_out(), whose comment says the rest: out = a @ b, or out += a @ b with accumulate. By shapes, layouts and the
// processor alone it goes one way or another.
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

}  // namespace dmoe
