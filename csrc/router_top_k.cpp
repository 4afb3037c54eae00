// router_top_k and its gradient on the CPU: token by token, in one pass over the logits.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "router_rows.h"

namespace dmoe {
namespace {

using std::optional;
using std::string;

template <typename T>
const T* data(const optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}
optional<Tensor> dense(const optional<Tensor>& tensor) {
  return tensor ? optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Some microseconds of work.
int64_t tokens_per_task(const RouterRule& rule) { return std::max<int64_t>(1, 16384 / (rule.experts + 16 * rule.top_k)); }

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results router_top_k(Tensor logits, optional<Tensor> selection_bias, optional<Tensor> token_mask,
                     optional<Tensor> expert_indices, bool with_log_z, bool count_first, int64_t top_k,
                     string score_function, int64_t num_groups, int64_t top_k_groups, string group_score,
                     double normalization, double scale) {
  check_dim("router_top_k", "logits", logits, 2);
  const int64_t T = logits.size(0), E = logits.size(1);
  const RouterRule rule = router_rule(E, top_k, score_function, num_groups, top_k_groups, group_score, normalization, scale);
  const Tensor from = torch::stable::contiguous(logits);
  const optional<Tensor> mask = dense(token_mask), given = dense(expert_indices);
  optional<Tensor> bias = dense(selection_bias);
  if (bias) check_dtype("router_top_k", "selection_bias", *bias, ScalarType::Float);
  if (mask) check_dtype("router_top_k", "token_mask", *mask, ScalarType::Bool);
  if (given) {
    const ScalarType type = given->scalar_type();
    DMOE_CHECK(type == ScalarType::Long || type == ScalarType::Int,
               "router_top_k: expert_indices: expected int32 or int64, got ", toString(type));
  }
  Tensor scores = torch::stable::new_empty(from, {T, E}), log_z = torch::stable::new_empty(from, {with_log_z ? T : 0});
  Tensor ids = torch::stable::new_empty(from, {T, top_k}, ScalarType::Long);
  Tensor weights = torch::stable::new_empty(from, {T, top_k});
  Tensor first = torch::stable::new_empty(from, {count_first ? E : 0}, ScalarType::Int);
  auto* chosen = static_cast<int64_t*>(ids.mutable_data_ptr());
  dispatch_floating("router_top_k", "logits", from, [&](auto zero) {
    using N = decltype(zero);
    const N* in = static_cast<const N*>(from.const_data_ptr());
    N *out = static_cast<N*>(scores.mutable_data_ptr()), *weighed = static_cast<N*>(weights.mutable_data_ptr());
    N* z = static_cast<N*>(log_z.mutable_data_ptr());
    torch::stable::parallel_for(0, T, tokens_per_task(rule), [&](int64_t begin, int64_t end) {
      TokenRouter<N> router(rule);
      for (int64_t t = begin; t < end; ++t) {
        int64_t* mine = chosen + t * top_k;
        Accumulate<N> of_z{};
        router.score(in + t * E, out + t * E, with_log_z ? &of_z : nullptr);
        if (with_log_z) store(z + t, of_z);
        if (mask && !data<bool>(mask)[t]) {
          std::fill_n(mine, top_k, E);
        } else if (!given) {
          router.choose(out + t * E, data<float>(bias), mine);
        } else if (given->scalar_type() == ScalarType::Long) {
          std::copy_n(data<int64_t>(given) + t * top_k, top_k, mine);
        } else {
          std::copy_n(data<int32_t>(given) + t * top_k, top_k, mine);
        }
        router.weigh(out + t * E, mine, weighed + t * top_k);
      }
    });
  });
  if (count_first) {
    auto* counts = static_cast<int32_t*>(first.mutable_data_ptr());
    std::fill_n(counts, E, 0);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t id = chosen[t * top_k];
      if (id >= 0 && id < E) ++counts[id];  // E: masked; others: the plan says so
    }
  }
  return {scores, log_z, ids, weights, first};
}

Tensor router_top_k_backward(optional<Tensor> grad_scores, optional<Tensor> grad_log_z, optional<Tensor> grad_weights,
                             Tensor scores, optional<Tensor> logits, Tensor expert_indices, string score_function,
                             double normalization, double scale) {
  const int64_t T = scores.size(0), E = scores.size(1), K = expert_indices.size(1);
  const RouterRule rule = router_rule(E, K, score_function, 1, 1, "max", normalization, scale);
  const optional<Tensor> of_scores = dense(grad_scores), of_z = dense(grad_log_z), of_weights = dense(grad_weights);
  const optional<Tensor> in = dense(logits);
  const Tensor values = torch::stable::contiguous(scores), ids = torch::stable::contiguous(expert_indices);
  check_dtype("router_top_k_backward", "expert_indices", ids, ScalarType::Long);
  DMOE_CHECK(rule.softmax || !of_z || in, "router_top_k_backward: logits: expected a tensor with grad_log_z, got None");
  Tensor out = torch::stable::new_empty(values, {T, E});
  dispatch_floating("router_top_k_backward", "scores", values, [&](auto zero) {
    using N = decltype(zero);
    const auto row = [](const optional<Tensor>& tensor, int64_t t, int64_t width) {
      return tensor ? data<N>(tensor) + t * width : nullptr;
    };
    const N* s = static_cast<const N*>(values.const_data_ptr());
    N* to = static_cast<N*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, T, tokens_per_task(rule), [&](int64_t begin, int64_t end) {
      TokenRouter<N> router(rule);
      for (int64_t t = begin; t < end; ++t) {
        router.backward(row(of_scores, t, E), row(of_z, t, 1), row(of_weights, t, K), s + t * E, row(in, t, E),
                        static_cast<const int64_t*>(ids.const_data_ptr()) + t * K, to + t * E);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("router_top_k", TORCH_BOX(&dmoe::router_top_k));
  m.impl("router_top_k_backward", TORCH_BOX(&dmoe::router_top_k_backward));
}
