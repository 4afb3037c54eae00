// topk_indices on the CPU: rows in parallel.
#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "topk_rows.h"

namespace dmoe {
namespace {

template <typename Score>
void select(const Tensor& scores, const Tensor& out, int64_t k) {
  const int64_t num_experts = scores.size(1);
  const auto* from = static_cast<const Score*>(scores.data_ptr());
  auto* to = static_cast<int64_t*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / (num_experts + 16 * k));  // some microseconds of work
  torch::stable::parallel_for(0, scores.size(0), grain, [&](int64_t begin, int64_t end) {
    TopKRows<Score> rows(num_experts, k);
    for (int64_t row = begin; row < end; ++row) rows.select(from + row * num_experts, to + row * k);
  });
}

Tensor topk_indices(const Tensor& scores, int64_t k) {
  check_dim("topk_indices", "scores", scores, 2);
  const Tensor contiguous = torch::stable::contiguous(scores);
  const int64_t num_experts = scores.size(1);
  DMOE_CHECK(k >= 1 && k <= num_experts, "topk_indices: k: expected 1 to ", num_experts, " (scores has shape ",
             shape_of(scores), "), got ", k);
  DMOE_CHECK(num_experts < INT32_MAX, "topk_indices: scores: expected fewer than 2**31 experts, got ", num_experts);
  Tensor out = torch::stable::new_empty(contiguous, {scores.size(0), k}, ScalarType::Long);
  dispatch_floating("topk_indices", "scores", contiguous,
                    [&](auto zero) { select<decltype(zero)>(contiguous, out, k); });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("topk_indices", TORCH_BOX(&dmoe::topk_indices)); }
