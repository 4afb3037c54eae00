// quantized_gemm on the CPU: products of experts' rows with weights that are decoded block by block.
//
// A task is one expert and one block of columns of the result. It decodes that block of the weight into memory of its
// thread, which a core's own cache holds, and multiplies all rows of the expert with it, some hundreds at a time; so a
// weight is decoded once, and is never there as a whole. Only where columns make too few blocks are the rows of an
// expert spread over tasks as well. How the work is cut depends on shapes and rows per expert alone.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "expert_rows.h"
#include "gemm.h"
#include "pages.h"
#include "products.h"
#include "weight_formats.h"

namespace dmoe {
namespace {

using std::optional;
using std::string;

constexpr const char* kOp = "quantized_gemm";

constexpr int64_t kBlockBytes = 512 * 1024;  // of a decoded block, half of what a core's own cache has
constexpr int64_t kNarrowest = 32, kWidest = 256;
constexpr int64_t kBlockRows = 512;  // whose results stay in cache until the addend is added
constexpr int64_t kEnough = 8;       // tasks of one expert

WeightFormat format_of(const string& name) {
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "fp8") return WeightFormat::kFp8;
  if (name == "int4") return WeightFormat::kInt4;
  if (name == "nf4") return WeightFormat::kNf4;
  DMOE_CHECK(name == "mxfp4", kOp, ": format: expected int8, fp8, int4, nf4 or mxfp4, got ", name);
  return WeightFormat::kMxfp4;
}

ScalarType codes_dtype(WeightFormat format) {
  if (format == WeightFormat::kInt8) return ScalarType::Char;
  return format == WeightFormat::kFp8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte;
}

// The weights of all experts, checked: codes and scales are read at these places without looking.
struct Weights {
  Tensor codes, scales;
  optional<Tensor> zeros;
  WeightFormat format;
  int64_t experts, rows, columns, block_rows, block_columns;

  int64_t blocks_down() const { return (rows + block_rows - 1) / block_rows; }
  int64_t blocks_across() const { return (columns + block_columns - 1) / block_columns; }

  QuantizedMatrix of_expert(int64_t expert) const {
    const auto part = [&](const Tensor& tensor) {
      const int64_t bytes = tensor.numel() / experts * static_cast<int64_t>(tensor.element_size());
      return static_cast<const uint8_t*>(tensor.const_data_ptr()) + expert * bytes;
    };
    return {format,
            part(codes),
            part(scales),
            zeros ? part(*zeros) : nullptr,
            scales.scalar_type(),
            (zeros ? *zeros : scales).scalar_type(),
            columns,
            block_rows,
            block_columns};
  }
};

void check_scales(const char* name, const Tensor& scales, const Weights& w, bool e8m0) {
  const ScalarType dtype = scales.scalar_type();
  const bool is_float =
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  DMOE_CHECK(e8m0 ? dtype == ScalarType::Byte : is_float, kOp, ": ", name, ": expected ",
             e8m0 ? "uint8" : "float32, bfloat16 or float16", ", got ", toString(dtype));
  DMOE_CHECK(scales.dim() == 3 && scales.size(0) == w.experts && scales.size(1) == w.blocks_down() &&
                 scales.size(2) == w.blocks_across(),
             kOp, ": ", name, ": expected shape (", w.experts, ", ", w.blocks_down(), ", ", w.blocks_across(),
             "), one for each block of (", w.block_rows, ", ", w.block_columns, "), got ", shape_of(scales));
}

Weights read_weights(const Tensor& codes, const Tensor& scales, const optional<Tensor>& zeros, const string& name,
                     const std::vector<int64_t>& block) {
  const WeightFormat format = format_of(name);
  check_dim(kOp, "codes", codes, 3);
  check_dtype(kOp, "codes", codes, codes_dtype(format));
  const bool four_bits = has_four_bits(format);
  DMOE_CHECK(block.size() == 2 && block[0] >= 1 && block[1] >= 1, kOp,
             ": block: expected (rows, columns), at least 1, got ", block.size(), " numbers");
  const int64_t columns = codes.size(2) * (four_bits ? 2 : 1);
  if (four_bits) {
    DMOE_CHECK(block[0] == 1 && block[1] % kDecodeStep == 0 && columns % block[1] == 0, kOp, ": block: expected (1, ",
               "a multiple of ", kDecodeStep, " that divides K = ", columns, ") in 4 bits, got (", block[0], ", ",
               block[1], ")");
  }
  DMOE_CHECK(!zeros || format == WeightFormat::kInt4, kOp, ": zeros: expected None, as int4 alone has them, with ",
             name);
  Weights w{torch::stable::contiguous(codes), torch::stable::contiguous(scales),
            zeros ? optional<Tensor>(torch::stable::contiguous(*zeros)) : std::nullopt,
            format, codes.size(0), codes.size(1), columns, block[0], block[1]};
  check_scales("scales", w.scales, w, format == WeightFormat::kMxfp4);
  if (w.zeros) check_scales("zeros", *w.zeros, w, false);
  return w;
}

// How wide blocks of columns are, of sums over `inner`: as the thread's memory has room, and narrower where few rows
// make few tasks. Multiples of the steps in which codes are decoded, but for all columns.
int64_t block_width(int64_t rows, int64_t all_rows, int64_t inner, int64_t columns, int64_t item) {
  const int64_t fits = kBlockBytes / std::max<int64_t>(1, inner * item);
  const int64_t width = std::min(std::clamp(fits / kNarrowest * kNarrowest, kNarrowest, kWidest),
                                 column_width(rows, all_rows, inner, columns));
  return std::min(columns, (width + kNarrowest - 1) / kNarrowest * kNarrowest);
}

Tensor quantized_gemm(Tensor a, Tensor codes, Tensor scales, optional<Tensor> zeros, string format,
                      std::vector<int64_t> block, Tensor expert_offsets, bool trans_b, optional<Tensor> a2,
                      optional<Tensor> b2) {
  check_dim(kOp, "a", a, 2);
  check_product_dtype(kOp, a, a);
  const Weights weights = read_weights(codes, scales, zeros, format, block);
  const int64_t rows = a.size(0), inner = trans_b ? weights.columns : weights.rows;
  const int64_t columns = trans_b ? weights.rows : weights.columns;
  DMOE_CHECK(a.size(1) == inner, kOp, ": a: expected ", inner, " columns for matrices of ", weights.rows, " by ",
             weights.columns, trans_b ? ", transposed" : "", ", got shape ", shape_of(a));
  const std::vector<int64_t> offsets = read_offsets(kOp, expert_offsets, weights.experts, rows);
  DMOE_CHECK(a2.has_value() == b2.has_value(), kOp, ": expected a2 and b2, or neither");
  optional<Addend> addend;
  if (a2) {
    addend = Addend{*a2, *b2};
    check_addend(kOp, *addend, a, weights.experts, columns, trans_b);
  }
  Tensor out = large_empty(a, {rows, columns});
  const ScalarType dtype = a.scalar_type();
  const auto item = static_cast<int64_t>(a.element_size());
  const Tensor left = with_dense_rows(a);
  const Tensor left2 = addend ? with_dense_rows(addend->a) : left;
  const Tensor right2 = addend ? with_dense_experts(addend->b) : left;
  auto* out_data = static_cast<char*>(out.mutable_data_ptr());

  struct Task {
    int64_t expert, first_row, rows, begin, end;  // columns [begin, end) of these rows
  };
  std::vector<Task> tasks;
  const int64_t used = offsets[weights.experts];
  for (int64_t e = 0; e < weights.experts; ++e) {
    const int64_t count = offsets[e + 1] - offsets[e];
    if (count == 0 || columns == 0) continue;
    const int64_t width = block_width(count, used, inner, columns, item);
    const int64_t across = (columns + width - 1) / width;
    const int64_t pieces = std::clamp<int64_t>((count + kBlockRows / 2) / kBlockRows, 1, (kEnough + across - 1) / across);
    const int64_t height = ((count + pieces - 1) / pieces + 15) / 16 * 16;
    for (int64_t column = 0; column < columns; column += width) {
      for (int64_t row = 0; row < count; row += height) {
        tasks.push_back({e, offsets[e] + row, std::min(height, count - row), column, std::min(columns, column + width)});
      }
    }
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const Task& task = tasks[index];
    static thread_local Scratch decoded;
    TaskScratch& scratch = task_scratch();
    const int64_t width = task.end - task.begin;
    void* memory = decoded.get(std::max<int64_t>(1, width * inner * item));
    const QuantizedMatrix weight = weights.of_expert(task.expert);
    Matrix right = row_major(memory, inner, width, width);
    if (trans_b) {
      decode_block(weight, task.begin, task.end, 0, inner, memory, dtype);
      right = transposed(row_major(memory, width, inner, inner));
    } else {
      decode_block(weight, 0, inner, task.begin, task.end, memory, dtype);
    }
    const int64_t blocks = std::max<int64_t>(1, (task.rows + kBlockRows / 2) / kBlockRows);
    const int64_t height = ((task.rows + blocks - 1) / blocks + 15) / 16 * 16;
    for (int64_t row = 0; row < task.rows; row += height) {
      const int64_t first = task.first_row + row, here = std::min(height, task.rows - row);
      const int64_t padded = rows_to_give(here, width, dtype);
      const ResultBlock result(out_data + (first * columns + task.begin) * item, columns, here, width, padded, item,
                               scratch.second);
      multiply(result.matrix, rows_of(left, first, here, padded, item, scratch.first), right, dtype);
      if (addend) {
        multiply(result.matrix, rows_of(left2, first, here, padded, item, scratch.first),
                 columns_of(matrix_of(right2, task.expert, trans_b, item), task.begin, task.end, item), dtype, true);
      }
      result.put_back();
    }
  });
  if (used < rows && columns > 0) std::memset(out_data + used * columns * item, 0, (rows - used) * columns * item);
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("quantized_gemm", TORCH_BOX(&dmoe::quantized_gemm)); }
