// From a tensor's dtype to a C++ type.
#pragma once

#include <cstdint>

#include "check.h"
#include "simd.h"

namespace dmoe {

// Calls body(value) with a zero of the C++ type of an int16, int32 or int64 tensor.
template <typename Body>
inline void dispatch_integer(const char* op, const char* name, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Short:
      return body(int16_t{0});
    case ScalarType::Int:
      return body(int32_t{0});
    case ScalarType::Long:
      return body(int64_t{0});
    default:
      fail(op, ": ", name, ": expected dtype int16, int32 or int64, got ", toString(tensor.scalar_type()));
  }
}

// The same of a floating-point dtype; false, without a call, for any other.
template <typename Body>
inline bool with_floating(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      body(double{});
      return true;
    case ScalarType::Float:
      body(float{});
      return true;
    case ScalarType::BFloat16:
      body(BFloat16{});
      return true;
    case ScalarType::Half:
      body(Half{});
      return true;
    default:
      return false;
  }
}

// The same of a floating-point tensor.
template <typename Body>
inline void dispatch_floating(const char* op, const char* name, const Tensor& tensor, const Body& body) {
  DMOE_CHECK(with_floating(tensor.scalar_type(), body), op, ": ", name, ": expected a floating-point tensor, got ",
             toString(tensor.scalar_type()));
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  dispatch_floating(op, name, tensor, [](auto) {});
}

}  // namespace dmoe
