// Dense products of many rows by our own kernels, in float32, bfloat16 and float16, on one thread.
//
// Why not a library alone. MKL runs its AVX2 kernels on other makers' processors, half of what those with two AVX-512
// units do. oneDNN generates code for each new shape in bfloat16 (see gemm.h), and without instructions for it converts
// or rearranges whole factors. Here the factors of a block are packed as tiles read them, turned over and widened on the
// way, and every shape is code that exists: for bfloat16 pairs where the processor multiplies those, else float32.
//
// Which of the two a processor takes is measured: see product_choice.h.
#pragma once

#include "gemm.h"

namespace dmoe {

// Whether multiply_blocked() reads these: contiguous rows or columns, and sums of something.
bool blocked_takes(const Matrix& out, const Matrix& a, const Matrix& b);

// As mm_out(), whose comment says the rest. An element of the result depends on its row of `a`, its column of `b` and
// the length of the sum alone, which is added up in float32, in pieces of 256 numbers or pairs of them.
void multiply_blocked(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false);

}  // namespace dmoe
