// gate_weights on the CPU: dmoe/ops/gate_weights.py has the formulas. A token's K numbers fit in registers; as separate
// PyTorch operations they are a dozen passes over (T, K), and took longer than the top-k before them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "simd.h"

namespace dmoe {
namespace {

using std::optional;
constexpr int64_t kTokensPerTask = 1024;

struct Shape {
  int64_t tokens, experts, top_k;
  double p;
  bool after_drop;
  double scale;
};

template <typename A>
A power(A x, double p) {
  if (p == 1) return x;
  if (p == 2) return x * x;
  return std::pow(x, static_cast<A>(p));
}

// One token's choices: which are kept, their scores, and the norm they are divided by (1 for none).
template <typename T, typename Id>
struct Choices {
  using A = Accumulate<T>;
  std::vector<A> picked;
  std::vector<uint8_t> kept, counted;
  A norm;

  explicit Choices(int64_t top_k) : picked(top_k), kept(top_k), counted(top_k) {}

  void read(const T* scores, const Id* ids, const int32_t* rows, const Shape& shape) {
    constexpr A kTiny = std::is_same_v<T, Half> ? A(6.103515625e-05) : std::numeric_limits<A>::min();
    A largest = kTiny;
    for (int64_t k = 0; k < shape.top_k; ++k) {
      const bool chosen = ids[k] >= 0 && ids[k] < shape.experts;
      picked[k] = chosen ? load(scores + ids[k]) : A(0);
      kept[k] = chosen && (rows == nullptr || rows[k] >= 0);
      counted[k] = shape.after_drop ? kept[k] : chosen;
      if (counted[k] && !(picked[k] <= largest)) largest = picked[k];  // takes NaN over
    }
    norm = A(1);
    if (shape.p > 0) {  // relative to the largest: powers of small scores would underflow
      A sum = 0;
      for (int64_t k = 0; k < shape.top_k; ++k) {
        if (counted[k]) sum += power(picked[k] / largest, shape.p);
      }
      sum = shape.p == 1 ? sum : shape.p == 2 ? std::sqrt(sum) : std::pow(sum, static_cast<A>(1 / shape.p));
      norm = largest * (sum < A(1) ? A(1) : sum);
    }
  }
};

template <typename T, typename Id>
void forward(const T* scores, const Id* ids, const int32_t* rows, const Shape& shape, T* weights) {
  using A = Accumulate<T>;
  torch::stable::parallel_for(0, shape.tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    Choices<T, Id> choices(shape.top_k);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * shape.top_k;
      choices.read(scores + t * shape.experts, ids + at, rows == nullptr ? nullptr : rows + at, shape);
      for (int64_t k = 0; k < shape.top_k; ++k) {
        store(weights + at + k, choices.kept[k] ? choices.picked[k] * static_cast<A>(shape.scale) / choices.norm : A(0));
      }
    }
  });
}

template <typename T, typename Id>
void backward(const T* grad, const T* scores, const Id* ids, const int32_t* rows, const Shape& shape, T* grad_scores) {
  using A = Accumulate<T>;
  torch::stable::parallel_for(0, shape.tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    Choices<T, Id> choices(shape.top_k);
    std::fill(grad_scores + begin * shape.experts, grad_scores + end * shape.experts, T(0.0f));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * shape.top_k;
      T* out = grad_scores + t * shape.experts;
      choices.read(scores + t * shape.experts, ids + at, rows == nullptr ? nullptr : rows + at, shape);
      const A norm = choices.norm;
      A share = 0;  // sum over kept of the gradient with respect to g / n, times g / n
      for (int64_t k = 0; k < shape.top_k; ++k) {
        if (choices.kept[k]) share += load(grad + at + k) * static_cast<A>(shape.scale) * choices.picked[k];
      }
      share /= norm;
      for (int64_t k = 0; k < shape.top_k; ++k) {
        if (ids[at + k] < 0 || ids[at + k] >= shape.experts) continue;
        A value = choices.kept[k] ? load(grad + at + k) * static_cast<A>(shape.scale) : A(0);
        if (shape.p > 0 && choices.counted[k]) value -= share * power(choices.picked[k] / norm, shape.p - 1);
        store(out + ids[at + k], load(out + ids[at + k]) + value / norm);
      }
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
  switch (scores.scalar_type()) {
    case ScalarType::Double: return with_id(double{});
    case ScalarType::Float: return with_id(float{});
    case ScalarType::BFloat16: return with_id(BFloat16{});
    case ScalarType::Half: return with_id(Half{});
    default: fail("gate_weights: scores: expected a floating-point tensor, got ", toString(scores.scalar_type()));
  }
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
