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
#include "expert_rows.h"
#include "few_rows.h"
#include "gemm.h"
#include "pages.h"
#include "products.h"

namespace dmoe {
namespace {

// A block this tall reaches nine tenths of the speed of a tall product in bfloat16 and all of it in float32; small
// batches are cut finer so that there are blocks enough to share.
int64_t block_rows(int64_t rows) { return rows >= 4096 ? 256 : 128; }

Tensor grouped_gemm_of(const char* kOp, const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool trans_b,
                       const std::optional<Addend>& addend, bool by_row = false) {
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "b", b, 3);
  check_product_dtype(kOp, a, b);
  const int64_t rows = a.size(0), inner = a.size(1), num_experts = b.size(0);
  const int64_t columns = b.size(trans_b ? 1 : 2);
  DMOE_CHECK(b.size(trans_b ? 2 : 1) == inner, kOp, ": b: expected ",
             trans_b ? "(E, N, Kd)" : "(E, Kd, N)", " with Kd = ", inner, " for a of shape ", shape_of(a), ", got ",
             shape_of(b));
  const std::vector<int64_t> offsets = read_offsets(kOp, expert_offsets, num_experts, rows);
  if (addend) check_addend(kOp, *addend, a, num_experts, columns, trans_b);
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
      const int64_t width = by_row ? columns : column_width(rows_here, used, inner, columns);
      for (int64_t column = 0; column < columns; column += width) {
        tasks.push_back({e, offsets[e] + row, rows_here, column, std::min(columns, column + width)});
      }
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const Task& task = tasks[index];
    const int64_t width = task.end - task.begin, padded = rows_to_give(task.rows, width, dtype);
    TaskScratch& scratch = task_scratch();
    const ResultBlock result(out_data + (task.first_row * columns + task.begin) * item, columns, task.rows, width,
                             padded, item, scratch.second);
    const auto add_product = [&](const Tensor& from, const Tensor& experts, bool accumulate) {
      const Matrix factor = rows_of(from, task.first_row, task.rows, padded, item, scratch.first);
      const Matrix weight = columns_of(matrix_of(experts, task.expert, trans_b, item), task.begin, task.end, item);
      (by_row ? multiply_by_row : multiply)(result.matrix, factor, weight, dtype, accumulate);
    };
    add_product(left, right, false);
    if (addend) add_product(left2, right2, true);
    result.put_back();
  });
  if (used < rows && columns > 0) std::memset(out_data + used * columns * item, 0, (rows - used) * columns * item);
  return out;
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool trans_b) {
  return grouped_gemm_of("grouped_gemm", a, b, expert_offsets, trans_b, std::nullopt);
}

// A row of the result depends on its own factor and expert alone: see multiply_by_row().
Tensor grouped_gemm_invariant(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool trans_b) {
  return grouped_gemm_of("grouped_gemm_invariant", a, b, expert_offsets, trans_b, std::nullopt, true);
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
  m.impl("grouped_gemm_invariant", TORCH_BOX(&dmoe::grouped_gemm_invariant));
  m.impl("grouped_gemm_sum", TORCH_BOX(&dmoe::grouped_gemm_sum));
  m.impl("grouped_gemm_weight", TORCH_BOX(&dmoe::grouped_gemm_weight));
}
