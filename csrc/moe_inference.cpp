// A whole layer in inference on the CPU: router, plan and experts in one operation, for batches of which every call from
// Python costs as much as the arithmetic of a token. dmoe/ops/moe_inference.py says what it computes.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "moe_mlp.h"
#include "router_product.h"
#include "router_rows.h"
#include "routing_plan.h"

namespace dmoe {
namespace {

using std::optional;
using std::string;

// Choices and weights of all tokens; returns the mean entropy.
template <typename T>
double route(const Tensor& logits, const RouterRule& rule, const float* bias, int32_t* ids, Accumulate<T>* weights) {
  using A = Accumulate<T>;
  const int64_t tokens = logits.size(0), E = rule.experts, K = rule.top_k;
  const auto* from = static_cast<const T*>(logits.const_data_ptr());
  std::vector<A> entropy(tokens);
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, 16384 / (E + 16 * K)), [&](int64_t begin, int64_t end) {
    TokenRouter<T> router(rule);
    std::vector<T> scores(E), weighed(K);
    std::vector<int64_t> chosen(K);
    for (int64_t t = begin; t < end; ++t) {
      router.score(from + t * E, scores.data(), nullptr);
      router.choose(scores.data(), bias, chosen.data());
      router.weigh(scores.data(), chosen.data(), weighed.data());
      entropy[t] = router.entropy(from + t * E, scores.data());
      std::copy(chosen.begin(), chosen.end(), ids + t * K);
      for (int64_t k = 0; k < K; ++k) weights[t * K + k] = load(weighed.data() + k);
    }
  });
  double sum = 0;
  for (const A one : entropy) sum += one;
  return sum / static_cast<double>(std::max<int64_t>(tokens, 1));
}

std::tuple<Tensor, Tensor, Tensor> moe_inference(
    Tensor x, Tensor router_weight, optional<Tensor> router_bias, optional<Tensor> selection_bias,
    ScalarType router_dtype, int64_t top_k, string score_function, int64_t num_groups, int64_t top_k_groups,
    string group_score, double normalization, double scale, Tensor up_proj, Tensor down_proj, optional<Tensor> up_bias,
    optional<Tensor> down_bias, string activation, bool gated, string gate_weight_on, optional<Tensor> residual) {
  const RouterRule rule = router_rule(router_weight.size(0), top_k, score_function, num_groups, top_k_groups, group_score,
                                      normalization, scale);
  if (selection_bias) check_dtype("moe_inference", "selection_bias", *selection_bias, ScalarType::Float);
  const Tensor logits = router_product(x, router_weight, router_bias, router_dtype);
  const int64_t T = x.size(0);
  const bool wide = router_dtype == ScalarType::Double;
  Tensor ids = torch::stable::new_empty(x, {T, top_k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(x, {T, top_k}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {});
  const auto* bias = selection_bias ? static_cast<const float*>(selection_bias->const_data_ptr()) : nullptr;
  auto* chosen = static_cast<int32_t*>(ids.mutable_data_ptr());
  if (wide) {
    *static_cast<double*>(entropy.mutable_data_ptr()) =
        route<double>(logits, rule, bias, chosen, static_cast<double*>(weights.mutable_data_ptr()));
  } else {
    check_dtype("moe_inference", "logits", logits, ScalarType::Float);
    *static_cast<float*>(entropy.mutable_data_ptr()) = static_cast<float>(
        route<float>(logits, rule, bias, chosen, static_cast<float*>(weights.mutable_data_ptr())));
  }
  const RoutingPlanCall plan(ids, rule.experts, 1, std::nullopt, false, std::nullopt, false, 0);
  make_plan(plan);
  Tensor token_offsets = torch::stable::new_empty(x, {T + 1}, ScalarType::Int);
  auto* offsets = static_cast<int32_t*>(token_offsets.mutable_data_ptr());
  for (int64_t t = 0; t <= T; ++t) offsets[t] = static_cast<int32_t>(t * top_k);
  const InferenceCall call{x, weights, up_proj, down_proj, up_bias, down_bias, std::nullopt, residual, activation, gated,
                           gate_weight_on};
  return {run_experts(call, plan, token_offsets), plan.tokens_per_expert, entropy};
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("moe_inference", TORCH_BOX(&dmoe::moe_inference)); }
