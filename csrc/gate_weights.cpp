// gate_weights on the CPU: dmoe/ops/gate_weights.py has the formulas. A token's K numbers fit in registers; as separate
// PyTorch operations they are a dozen passes over (T, K), and took longer than the top-k before them.
#include <algorithm>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "gate_rows.h"
#include "simd.h"

namespace dmoe {
namespace {

using std::optional;
using Shape = GateShape;
constexpr int64_t kTokensPerTask = 1024;

template <typename T, typename Id>
void forward(const T* scores, const Id* ids, const int32_t* rows, const Shape& shape, T* weights) {
  torch::stable::parallel_for(0, shape.tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    GateChoices<T, Id> choices(shape);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * shape.top_k;
      choices.read(scores + t * shape.experts, ids + at, rows == nullptr ? nullptr : rows + at);
      choices.write(weights + at);
    }
  });
}

template <typename T, typename Id>
void backward(const T* grad, const T* scores, const Id* ids, const int32_t* rows, const Shape& shape, T* grad_scores) {
  torch::stable::parallel_for(0, shape.tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    GateChoices<T, Id> choices(shape);
    std::fill(grad_scores + begin * shape.experts, grad_scores + end * shape.experts, T(0.0f));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * shape.top_k;
      T* out = grad_scores + t * shape.experts;
      choices.read(scores + t * shape.experts, ids + at, rows == nullptr ? nullptr : rows + at);
      choices.add_gradient(grad + at, ids + at, out);
    }
  });
}

template <typename Function>
void with_types(const Tensor& scores, const Tensor& ids, const Function& fn) {
  DMOE_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
             "gate_weights: expert_indices: expected int32 or int64, got ", toString(ids.scalar_type()));
  const auto with_id = [&](auto zero) {
    ids.scalar_type() == ScalarType::Long ? fn(zero, int64_t{}) : fn(zero, int32_t{});
  };
  dispatch_floating("gate_weights", "scores", scores, with_id);
}

const int32_t* rows_of(const optional<Tensor>& token_to_rows) {
  if (!token_to_rows) return nullptr;
  check_dtype("gate_weights", "token_to_rows", *token_to_rows, ScalarType::Int);
  return static_cast<const int32_t*>(token_to_rows->const_data_ptr());
}

Tensor gate_weights(Tensor scores, Tensor expert_indices, optional<Tensor> token_to_rows, double p, bool after_drop,
                    double scale) {
  const Tensor values = torch::stable::contiguous(scores), ids = torch::stable::contiguous(expert_indices);
  if (token_to_rows) token_to_rows = torch::stable::contiguous(*token_to_rows);
  const Shape shape{scores.size(0), scores.size(1), ids.size(1), p, after_drop, scale};
  Tensor out = torch::stable::new_empty(scores, {shape.tokens, shape.top_k});
  with_types(scores, ids, [&](auto zero, auto id) {
    using T = decltype(zero);
    using Id = decltype(id);
    forward<T, Id>(static_cast<const T*>(values.const_data_ptr()), static_cast<const Id*>(ids.const_data_ptr()),
                   rows_of(token_to_rows), shape, static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor gate_weights_backward(Tensor grad, Tensor scores, Tensor expert_indices, optional<Tensor> token_to_rows, double p,
                             bool after_drop, double scale) {
  const Tensor values = torch::stable::contiguous(scores), ids = torch::stable::contiguous(expert_indices), grads = torch::stable::contiguous(grad);
  if (token_to_rows) token_to_rows = torch::stable::contiguous(*token_to_rows);
  check_dtype("gate_weights_backward", "grad", grad, scores.scalar_type());
  const Shape shape{scores.size(0), scores.size(1), ids.size(1), p, after_drop, scale};
  Tensor out = torch::stable::new_empty(scores, {shape.tokens, shape.experts});
  with_types(scores, ids, [&](auto zero, auto id) {
    using T = decltype(zero);
    using Id = decltype(id);
    backward<T, Id>(static_cast<const T*>(grads.const_data_ptr()), static_cast<const T*>(values.const_data_ptr()),
                    static_cast<const Id*>(ids.const_data_ptr()), rows_of(token_to_rows), shape,
                    static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("gate_weights", TORCH_BOX(&dmoe::gate_weights));
  m.impl("gate_weights_backward", TORCH_BOX(&dmoe::gate_weights_backward));
}
