// The router's linear: logits of every token, in the router's own precision.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace dmoe {

// x (T, H) @ weight (E, H)^T + bias (E,), as (T, E) in `dtype`: that of x and weight, or float32. Neither is copied as a
// whole where it has to be widened: weights by some experts at a time. Bits depend on the shapes alone.
torch::stable::Tensor router_product(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                     const std::optional<torch::stable::Tensor>& bias,
                                     torch::headeronly::ScalarType dtype);

}  // namespace dmoe
