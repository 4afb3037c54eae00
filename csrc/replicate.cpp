// replicate and its transpose on the CPU.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "dispatch.h"
#include "replicate.h"

namespace dmoe {
namespace {

constexpr int64_t kGrain = 32768;  // elements that repay waking a thread

// (E+1,): bins with a leading 0, checked to be never falling and in 0 .. length.
std::vector<int64_t> checked_offsets(const char* op, const Tensor& bins_tensor, int64_t length) {
  const Tensor bins = as_contiguous(bins_tensor);
  const bool is_int = bins.scalar_type() == ScalarType::Int;
  std::vector<int64_t> offsets{0};
  for (int64_t e = 0; e < bins.size(0); ++e) {
    const int64_t end = is_int ? static_cast<const int32_t*>(bins.data_ptr())[e]
                               : static_cast<const int64_t*>(bins.data_ptr())[e];
    DMOE_CHECK(end >= offsets.back() && end <= length, op, ": bins[", e, "]: expected ", offsets.back(), " .. ", length,
               " (never falling), got ", end);
    offsets.push_back(end);
  }
  return offsets;
}

// Rows are shared out to threads; a value is only copied, so any type of the same size will do.
template <typename Value>
void copy_values(const Tensor& x, const std::vector<int64_t>& offsets, int64_t length, const Tensor& out) {
  const int64_t E = x.size(1);
  const Value* const from = static_cast<const Value*>(x.data_ptr());
  Value* const to = static_cast<Value*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Value* const row = to + b * length;
      for (int64_t e = 0; e < E; ++e) {
        std::fill(row + offsets[static_cast<size_t>(e)], row + offsets[static_cast<size_t>(e + 1)], from[b * E + e]);
      }
      std::fill(row + offsets.back(), row + length, Value{0});
    }
  });
}

Tensor replicate(Tensor x, Tensor bins, int64_t length) {
  check_replicate("replicate", x, bins);
  DMOE_CHECK(bins.size(0) == x.size(1), "replicate: bins: expected shape (", x.size(1), "), got ", shape_of(bins));
  DMOE_CHECK(length >= 0, "replicate: length: expected at least 0, got ", length);
  const std::vector<int64_t> offsets = checked_offsets("replicate", bins, length);
  x = as_contiguous(x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), length});
  switch (x.scalar_type()) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short:
      copy_values<int16_t>(x, offsets, length, out);
      break;
    case ScalarType::Float:
    case ScalarType::Int:
      copy_values<int32_t>(x, offsets, length, out);
      break;
    case ScalarType::Double:
    case ScalarType::Long:
      copy_values<int64_t>(x, offsets, length, out);
      break;
    default:
      fail("replicate: x: expected a float dtype or int16, int32, int64, got ", toString(x.scalar_type()));
  }
  return out;
}

template <typename Value>
void sum_values(const Tensor& grad, const std::vector<int64_t>& offsets, const Tensor& out) {
  using Sum = std::conditional_t<std::is_same_v<Value, double>, double, float>;
  const int64_t E = out.size(1), length = grad.size(1);
  const Value* const from = static_cast<const Value*>(grad.data_ptr());
  Value* const to = static_cast<Value*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, grad.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t e = 0; e < E; ++e) {
        // Eight sums side by side: vector instructions, and an error that grows an eighth as fast.
        const Value* value = from + b * length + offsets[static_cast<size_t>(e)];
        const int64_t count = offsets[static_cast<size_t>(e + 1)] - offsets[static_cast<size_t>(e)];
        Sum sums[8] = {};
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) {
          for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += static_cast<Sum>(value[i + lane]);
        }
        for (int64_t lane = 0; i < count; ++i, ++lane) sums[lane] += static_cast<Sum>(value[i]);
        const Sum low = (sums[0] + sums[4]) + (sums[2] + sums[6]), high = (sums[1] + sums[5]) + (sums[3] + sums[7]);
        to[b * E + e] = static_cast<Value>(low + high);
      }
    }
  });
}

Tensor replicate_backward(Tensor grad, Tensor bins) {
  check_replicate("replicate_backward", grad, bins);
  const std::vector<int64_t> offsets = checked_offsets("replicate_backward", bins, grad.size(1));
  grad = as_contiguous(grad);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), bins.size(0)});
  dispatch_floating("replicate_backward", "grad", grad,
                    [&](auto zero) { sum_values<decltype(zero)>(grad, offsets, out); });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("replicate", TORCH_BOX(&dmoe::replicate));
  m.impl("replicate_backward", TORCH_BOX(&dmoe::replicate_backward));
}
