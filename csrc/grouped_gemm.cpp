// grouped_gemm and its weight gradient on the CPU: one single-threaded product per task, tasks spread over the threads.
//
// How the work is cut depends on the shapes and the rows per expert, not on the number of threads. Rows are cut for the
// product, and columns where few rows make few tasks; a weight gradient sums over rows, so there the output is cut, and
// only for experts that hold much of the batch. One hot expert thus keeps every core busy.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "few_rows.h"
#include "gemm.h"
#include "pages.h"

namespace dmoe {
namespace {

// A block this tall reaches nine tenths of the speed of a tall product in bfloat16 and all of it in float32; small
// batches are cut finer so that there are blocks enough to share.
int64_t block_rows(int64_t rows) { return rows >= 4096 ? 256 : 128; }

// Whether memory behind an element of each row lies row by row, so that the GEMM takes it without a copy.
bool has_dense_rows(const Tensor& tensor, int64_t row_dim, int64_t column_dim) {
  return tensor.stride(column_dim) == 1 && tensor.stride(row_dim) >= std::max<int64_t>(1, tensor.size(column_dim));
}

Tensor with_dense_rows(const Tensor& matrix) {
  return has_dense_rows(matrix, 0, 1) ? matrix : torch::stable::contiguous(matrix);
}

Tensor with_dense_experts(const Tensor& b) {
  return has_dense_rows(b, 1, 2) || has_dense_rows(b, 2, 1) ? b : torch::stable::contiguous(b);
}

void check_product_dtype(const char* op, const Tensor& a, const Tensor& b) {
  const ScalarType dtype = a.scalar_type();
  DMOE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
                 dtype == ScalarType::Half,
             op, ": a: expected float32, float64, bfloat16 or float16, got ", toString(dtype));
  check_dtype(op, "b", b, dtype);
}

// The first row of each expert, then the end of the last; checked, since products will read and write there.
std::vector<int64_t> read_offsets(const char* op, const Tensor& expert_offsets, int64_t num_experts, int64_t rows) {
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
TaskScratch& task_scratch() {
  static thread_local TaskScratch scratch;
  return scratch;
}

// Copies `rows` rows of `columns` elements into dense rows, and zeros up to `padded_rows`.
void copy_padded(void* to, const char* from, int64_t rows, int64_t padded_rows, int64_t row_stride_bytes,
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

Tensor grouped_gemm_of(const char* kOp, const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool trans_b,
                       const std::optional<Addend>& addend) {
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "b", b, 3);
  check_product_dtype(kOp, a, b);
  const int64_t rows = a.size(0), inner = a.size(1), num_experts = b.size(0);
  const int64_t columns = b.size(trans_b ? 1 : 2);
  DMOE_CHECK(b.size(trans_b ? 2 : 1) == inner, kOp, ": b: expected ",
             trans_b ? "(E, N, Kd)" : "(E, Kd, N)", " with Kd = ", inner, " for a of shape ", shape_of(a), ", got ",
             shape_of(b));
  const std::vector<int64_t> offsets = read_offsets(kOp, expert_offsets, num_experts, rows);
  if (addend) {
    check_product_dtype(kOp, a, addend->a), check_product_dtype(kOp, a, addend->b);
    check_dim(kOp, "a2", addend->a, 2), check_dim(kOp, "b2", addend->b, 3);
    DMOE_CHECK(addend->a.size(0) == rows && addend->b.size(0) == num_experts &&
                   addend->b.size(trans_b ? 1 : 2) == columns && addend->b.size(trans_b ? 2 : 1) == addend->a.size(1),
               kOp, ": expected a2 and b2 of ", rows, " rows, ", num_experts, " experts and ", columns,
               " columns, got shapes ", shape_of(addend->a), " and ", shape_of(addend->b));
  }
  Tensor out = large_empty(a, {rows, columns});
  const ScalarType dtype = a.scalar_type();
  const auto item = static_cast<int64_t>(a.element_size());
  const Tensor left = with_dense_rows(a), right = with_dense_experts(b);
  const Tensor left2 = addend ? with_dense_rows(addend->a) : left;
  const Tensor right2 = addend ? with_dense_experts(addend->b) : right;

  auto* out_data = static_cast<char*>(out.data_ptr());

  struct Task {
    int64_t expert, first_row, rows, begin, end;  // columns [begin, end) of these rows
  };
  std::vector<Task> tasks;
  const int64_t used = offsets[num_experts];
  const int64_t block = block_rows(rows);
  for (int64_t e = 0; e < num_experts; ++e) {
    // As many blocks as come nearest to that height, all of one height: a small remainder would pay for packing the
    // weight once more.
    const int64_t count = offsets[e + 1] - offsets[e];
    const int64_t pieces = std::max<int64_t>(1, (count + block / 2) / block);
    const int64_t height = ((count + pieces - 1) / pieces + 15) / 16 * 16;
    for (int64_t row = 0; row < count; row += height) {
      const int64_t rows_here = std::min(height, count - row);
      const int64_t width = column_width(rows_here, used, inner, columns);
      for (int64_t column = 0; column < columns; column += width) {
        tasks.push_back({e, offsets[e] + row, rows_here, column, std::min(columns, column + width)});
      }
    }
  }
  // The rows of a task as its product takes them: where they are, or where that would read beyond the last, a copy.
  const auto rows_of = [&](const Tensor& from, const Task& task, int64_t padded, Scratch& scratch) {
    const int64_t stride = from.stride(0), width = from.size(1);
    const char* first = static_cast<const char*>(from.data_ptr()) + task.first_row * stride * item;
    if (task.first_row + padded <= rows) return row_major(first, padded, width, stride);  // any row does as padding
    const Matrix copy = row_major(scratch.get(padded * width * item), padded, width, width);
    copy_padded(copy.data, first, task.rows, padded, stride * item, width * item);
    return copy;
  };
  const auto columns_of_expert = [&](const Tensor& of, const Task& task) {
    const char* first = static_cast<const char*>(of.data_ptr()) + task.expert * of.stride(0) * item;
    const Matrix weight{const_cast<char*>(first), of.size(1), of.size(2), of.stride(1), of.stride(2)};
    return columns_of(trans_b ? transposed(weight) : weight, task.begin, task.end, item);
  };
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const Task& task = tasks[index];
    char* to = out_data + (task.first_row * columns + task.begin) * item;
    const int64_t width = task.end - task.begin, padded = rows_to_give(task.rows, width, dtype);
    TaskScratch& scratch = task_scratch();
    Matrix result = row_major(to, padded, width, columns);
    if (padded != task.rows) result = row_major(scratch.second.get(padded * width * item), padded, width, width);
    const auto add_product = [&](const Tensor& rows, const Tensor& experts, bool accumulate) {
      multiply(result, rows_of(rows, task, padded, scratch.first), columns_of_expert(experts, task), dtype, accumulate);
    };
    add_product(left, right, false);
    if (addend) add_product(left2, right2, true);
    for (int64_t row = 0; result.data != to && row < task.rows; ++row) {
      std::memcpy(to + row * columns * item, static_cast<char*>(result.data) + row * width * item, width * item);
    }
  });
  if (used < rows && columns > 0) std::memset(out_data + used * columns * item, 0, (rows - used) * columns * item);
  return out;
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool trans_b) {
  return grouped_gemm_of("grouped_gemm", a, b, expert_offsets, trans_b, std::nullopt);
}

Tensor grouped_gemm_sum(const Tensor& a, const Tensor& b, const Tensor& a2, const Tensor& b2,
                        const Tensor& expert_offsets, bool trans_b) {
  return grouped_gemm_of("grouped_gemm_sum", a, b, expert_offsets, trans_b, Addend{a2, b2});
}

Tensor grouped_gemm_weight(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, int64_t num_experts) {
  constexpr const char* kOp = "grouped_gemm_weight";
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "b", b, 2);
  check_product_dtype(kOp, a, b);
  const int64_t rows = a.size(0), height = a.size(1), columns = b.size(1);
  DMOE_CHECK(b.size(0) == rows, kOp, ": b: expected as many rows as a, ", rows, ", got shape ", shape_of(b));
  DMOE_CHECK(num_experts >= 0, kOp, ": num_experts: expected 0 or more, got ", num_experts);
  const std::vector<int64_t> offsets = read_offsets(kOp, expert_offsets, num_experts, rows);
  Tensor out = large_empty(a, {num_experts, height, columns});
  const ScalarType dtype = a.scalar_type();
  const auto item = static_cast<int64_t>(a.element_size());
  const Tensor left = with_dense_rows(a), right = with_dense_rows(b);
  const auto* a_data = static_cast<const char*>(left.data_ptr());
  const auto* b_data = static_cast<const char*>(right.data_ptr());
  auto* out_data = static_cast<char*>(out.data_ptr());

  struct Task {
    int64_t expert, first_column, columns;  // of a, which are rows of the output
  };
  std::vector<Task> tasks;
  constexpr int64_t kShare = 16, kNarrowest = 128;  // narrower outputs spend their time on packing b
  const int64_t used = offsets[num_experts];
  for (int64_t e = 0; e < num_experts; ++e) {
    int64_t width = height;  // halved until a task is at most a sixteenth of the work
    const int64_t count = offsets[e + 1] - offsets[e];
    while (width >= 2 * kNarrowest && count * width * kShare > used * height) width = (width + 1) / 2;
    width = (width + 15) / 16 * 16;
    for (int64_t column = 0; column < height; column += width) {
      tasks.push_back({e, column, std::min(width, height - column)});
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t first = offsets[task.expert], count = offsets[task.expert + 1] - first;
    char* to = out_data + (task.expert * height + task.first_column) * columns * item;
    if (count == 0 || columns == 0) {
      std::memset(to, 0, task.columns * columns * item);
      return;
    }
    const char* a_from = a_data + (first * left.stride(0) + task.first_column) * item;
    const char* b_from = b_data + first * right.stride(0) * item;
    const int64_t padded = sums_to_give(count, task.columns, columns, dtype);
    Matrix a_block = row_major(a_from, padded, task.columns, left.stride(0));
    Matrix b_block = row_major(b_from, padded, columns, right.stride(0));
    if (padded != count) {
      TaskScratch& scratch = task_scratch();
      a_block = row_major(scratch.first.get(padded * task.columns * item), padded, task.columns, task.columns);
      b_block = row_major(scratch.second.get(padded * columns * item), padded, columns, columns);
      copy_padded(a_block.data, a_from, count, padded, left.stride(0) * item, task.columns * item);
      copy_padded(b_block.data, b_from, count, padded, right.stride(0) * item, columns * item);
    }
    multiply(row_major(to, task.columns, columns, columns), transposed(a_block), b_block, dtype);
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&dmoe::grouped_gemm));
  m.impl("grouped_gemm_sum", TORCH_BOX(&dmoe::grouped_gemm_sum));
  m.impl("grouped_gemm_weight", TORCH_BOX(&dmoe::grouped_gemm_weight));
}
