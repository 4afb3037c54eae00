// Error messages that name the operation, the argument, what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// torch 2.12 renamed the check of what a function of the C interface returns; the floor is 2.10.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace dmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// DMOE_CHECK(condition, "sort: keys: expected ..., got ", value, ...) throws std::runtime_error, which Python sees as
// RuntimeError. Never call it inside a parallel region: record the offence there and check after the region.
template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error("dmoe::" + text.str());
}
#define DMOE_CHECK(condition, ...) \
  do {                             \
    if (!(condition)) ::dmoe::fail(__VA_ARGS__); \
  } while (0)

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ")";
  return text.str();
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  DMOE_CHECK(tensor.is_contiguous(), op, ": ", name, ": expected a contiguous tensor, got strides of a view of shape ",
             shape_of(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
  DMOE_CHECK(tensor.scalar_type() == expected, op, ": ", name, ": expected dtype ", toString(expected), ", got ",
             toString(tensor.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t expected) {
  DMOE_CHECK(tensor.dim() == expected, op, ": ", name, ": expected ", expected, " dimensions, got shape ",
             shape_of(tensor));
}

}  // namespace dmoe
