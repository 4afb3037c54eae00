// permute on the CPU: one memcpy per row, whatever the dtype.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "pages.h"

namespace dmoe {
namespace {

Tensor permute(const Tensor& x, const Tensor& row_to_token, const Tensor& token_offsets, const Tensor& token_rows) {
  check_dim("permute", "x", x, 2);
  check_dim("permute", "row_to_token", row_to_token, 1);
  check_dtype("permute", "row_to_token", row_to_token, ScalarType::Int);
  const Tensor source = torch::stable::contiguous(x);
  const Tensor index = torch::stable::contiguous(row_to_token);
  const int64_t tokens = x.size(0), rows = row_to_token.size(0);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor out = large_empty(source, {rows, x.size(1)});
  if (row_bytes == 0) return out;

  const auto* from = static_cast<const char*>(source.data_ptr());
  auto* to = static_cast<char*>(out.data_ptr());
  const auto* token_of = static_cast<const int32_t*>(index.data_ptr());
  std::atomic<int64_t> bad_row{-1};
  const int64_t grain = std::max<int64_t>(1, 65536 / row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = token_of[row];
      if (token >= 0 && token < tokens) {
        std::memcpy(to + row * row_bytes, from + token * row_bytes, row_bytes);
      } else {
        std::memset(to + row * row_bytes, 0, row_bytes);
        if (token != -1) bad_row.store(row, std::memory_order_relaxed);
      }
    }
  });
  const int64_t bad = bad_row.load();
  DMOE_CHECK(bad < 0, "permute: row_to_token: expected tokens from 0 to ", tokens - 1, ", or -1, got ", token_of[bad],
             " at row ", bad);
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("permute", TORCH_BOX(&dmoe::permute)); }
