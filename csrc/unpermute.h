// What the CPU and the CUDA side of unpermute share: checked index vectors and weights.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace dmoe {

inline Tensor int32_vector(const char* op, const char* name, const Tensor& tensor) {
  check_dim(op, name, tensor, 1);
  check_dtype(op, name, tensor, ScalarType::Int);
  return torch::stable::contiguous(tensor);
}

// Contiguous, in the type of the sums, of shape (assignments,).
inline Tensor prepare_weights(const char* op, const Tensor& weights, int64_t assignments, ScalarType type) {
  check_dim(op, "gate_weights", weights, 1);
  DMOE_CHECK(weights.size(0) == assignments, op, ": gate_weights: expected one for each of the ", assignments,
             " assignments of token_rows, got ", weights.size(0));
  return torch::stable::contiguous(torch::stable::to(weights, type));
}

}  // namespace dmoe
