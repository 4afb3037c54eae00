// What products over the rows of experts share: factors as a GEMM takes them, offsets, blocks of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "gemm.h"

namespace dmoe {

// Whether memory behind an element of each row lies row by row, so that the GEMM takes it without a copy.
inline bool has_dense_rows(const Tensor& tensor, int64_t row_dim, int64_t column_dim) {
  return tensor.stride(column_dim) == 1 && tensor.stride(row_dim) >= std::max<int64_t>(1, tensor.size(column_dim));
}

inline Tensor with_dense_rows(const Tensor& matrix) {
  return has_dense_rows(matrix, 0, 1) ? matrix : torch::stable::contiguous(matrix);
}

inline Tensor with_dense_experts(const Tensor& b) {
  return has_dense_rows(b, 1, 2) || has_dense_rows(b, 2, 1) ? b : torch::stable::contiguous(b);
}

inline void check_product_dtype(const char* op, const Tensor& a, const Tensor& b) {
  const ScalarType dtype = a.scalar_type();
  DMOE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                 dtype == ScalarType::Half,
             op, ": a: expected float32, float64, bfloat16 or float16, got ", toString(dtype));
  check_dtype(op, "b", b, dtype);
}

// The first row of each expert, then the end of the last; checked, since products will read and write there.
inline std::vector<int64_t> read_offsets(const char* op, const Tensor& expert_offsets, int64_t num_experts, int64_t rows) {
  check_dim(op, "expert_offsets", expert_offsets, 1);
  check_dtype(op, "expert_offsets", expert_offsets, ScalarType::Int);
  DMOE_CHECK(expert_offsets.size(0) == num_experts + 1, op, ": expert_offsets: expected shape (", num_experts + 1,
             ",), one more than experts, got ", shape_of(expert_offsets));
  const Tensor contiguous = torch::stable::contiguous(expert_offsets);
  const auto* from = static_cast<const int32_t*>(contiguous.data_ptr());
  std::vector<int64_t> offsets(from, from + num_experts + 1);
  DMOE_CHECK(offsets[0] == 0, op, ": expert_offsets: expected a leading 0, got ", offsets[0]);
  for (int64_t e = 0; e < num_experts; ++e) {
    DMOE_CHECK(offsets[e] <= offsets[e + 1] && offsets[e + 1] <= rows, op,
               ": expert_offsets: expected an ascending sequence up to ", rows, " rows, got ", offsets[e], ", ",
               offsets[e + 1], " for expert ", e);
  }
  return offsets;
}

// Scratch that a thread keeps: two matrices of one task. Sized by a block of rows (or by the rows of one expert, for a
// weight gradient in bfloat16), it stays small beside the operands.
struct TaskScratch {
  Scratch first, second;
};
inline TaskScratch& task_scratch() {
  static thread_local TaskScratch scratch;
  return scratch;
}

// Copies `rows` rows of `columns` elements into dense rows, and zeros up to `padded_rows`.
inline void copy_padded(void* to, const char* from, int64_t rows, int64_t padded_rows, int64_t row_stride_bytes,
                        int64_t row_bytes) {
  auto* bytes = static_cast<char*>(to);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(bytes + row * row_bytes, from + row * row_stride_bytes, row_bytes);
  }
  std::memset(bytes + rows * row_bytes, 0, (padded_rows - rows) * row_bytes);
}

// What is added to a product while its rows are in cache: another, usually thin one.
struct Addend {
  Tensor a, b;  // rows and experts of the first's; b with the same order
};

inline void check_addend(const char* op, const Addend& addend, const Tensor& a, int64_t num_experts, int64_t columns,
                         bool trans_b) {
  check_product_dtype(op, a, addend.a), check_product_dtype(op, a, addend.b);
  check_dim(op, "a2", addend.a, 2), check_dim(op, "b2", addend.b, 3);
  DMOE_CHECK(addend.a.size(0) == a.size(0) && addend.b.size(0) == num_experts &&
                 addend.b.size(trans_b ? 1 : 2) == columns && addend.b.size(trans_b ? 2 : 1) == addend.a.size(1),
             op, ": expected a2 and b2 of ", a.size(0), " rows, ", num_experts, " experts and ", columns,
             " columns, got shapes ", shape_of(addend.a), " and ", shape_of(addend.b));
}

// Rows [first, first + rows) of a matrix of dense rows as a product of `padded` ones takes them: where they are, or,
// where that would read beyond the last, a copy.
inline Matrix rows_of(const Tensor& from, int64_t first, int64_t rows, int64_t padded, int64_t item, Scratch& scratch) {
  const int64_t stride = from.stride(0), width = from.size(1);
  const char* data = static_cast<const char*>(from.data_ptr()) + first * stride * item;
  if (first + padded <= from.size(0)) return row_major(data, padded, width, stride);  // any row does as padding
  const Matrix copy = row_major(scratch.get(padded * width * item), padded, width, width);
  copy_padded(copy.data, data, rows, padded, stride * item, width * item);
  return copy;
}

// The matrix of an expert, or its transpose.
inline Matrix matrix_of(const Tensor& experts, int64_t expert, bool transpose, int64_t item) {
  const char* data = static_cast<const char*>(experts.data_ptr()) + expert * experts.stride(0) * item;
  const Matrix matrix{const_cast<char*>(data), experts.size(1), experts.size(2), experts.stride(1), experts.stride(2)};
  return transpose ? transposed(matrix) : matrix;
}

// A block of a result whose products are of `padded` rows: in its place, or, where those are more, in scratch.
class ResultBlock {
 public:
  ResultBlock(char* to, int64_t stride, int64_t rows, int64_t width, int64_t padded, int64_t item, Scratch& scratch)
      : matrix(padded == rows ? row_major(to, rows, width, stride)
                              : row_major(scratch.get(padded * width * item), padded, width, width)),
        to_(to), row_bytes_(stride * item), rows_(rows), bytes_(width * item) {}

  // Once the products are in `matrix`.
  void put_back() const {
    if (matrix.data == to_) return;
    const auto* from = static_cast<const char*>(matrix.data);
    for (int64_t row = 0; row < rows_; ++row) std::memcpy(to_ + row * row_bytes_, from + row * bytes_, bytes_);
  }

  const Matrix matrix;

 private:
  char* to_;
  int64_t row_bytes_, rows_, bytes_;
};

}  // namespace dmoe
