// The experts of moe_mlp.cpp for an operation that has made the plan itself.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "routing_plan.h"

namespace dmoe {

// What moe_mlp_inference of equally wide experts takes beside the plan: see dmoe/ops/_moe_mlp_call.py.
struct InferenceCall {
  Tensor x, gate_weights, up_proj, down_proj;
  std::optional<Tensor> up_bias, down_bias, gate_proj, residual;
  std::string activation;
  bool gated;
  std::string gate_weight_on;
};

// y (T, H), of a plan without drops.
Tensor run_experts(const InferenceCall& call, const RoutingPlanCall& plan, const Tensor& token_offsets);

}  // namespace dmoe
