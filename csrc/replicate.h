// What the CPU and the CUDA side of replicate share: checked shapes.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace dmoe {

// `x` is x in the forward (B, E) and the gradient (B, length) in the backward.
inline void check_replicate(const char* op, const Tensor& x, const Tensor& bins) {
  check_dim(op, "x", x, 2);
  check_dim(op, "bins", bins, 1);
  DMOE_CHECK(bins.size(0) >= 1, op, ": bins: expected at least one expert, got none");
  const ScalarType type = bins.scalar_type();
  DMOE_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": bins: expected dtype int32 or int64, got ",
             toString(type));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace dmoe
