// histogram on the CPU: every thread counts its run into counters of its own; the counters are added at the end.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "dispatch.h"
#include "runs.h"

namespace dmoe {
namespace {

template <typename Value>
void count_values(const Tensor& tensor, int64_t num_bins, int32_t* out) {
  const Value* const values = static_cast<const Value*>(tensor.data_ptr());
  const int64_t size = tensor.size(0);
  // A thread must count many times more values than there are counters to add up.
  const Runs runs(size, std::max<int64_t>(8192, 4 * num_bins));
  std::vector<int32_t> counts(static_cast<size_t>(runs.count() * num_bins), 0);
  std::vector<int64_t> first_bad(static_cast<size_t>(runs.count()), -1);
  runs.for_each([&](int64_t run, int64_t begin, int64_t end) {
    int32_t* const count = counts.data() + run * num_bins;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t value = static_cast<int64_t>(values[i]);
      if (value < 0 || value >= num_bins) {
        first_bad[static_cast<size_t>(run)] = i;
        return;
      }
      ++count[value];
    }
  });
  for (const int64_t bad : first_bad) {  // runs are in order: the first offender found is the first of all
    DMOE_CHECK(bad < 0, "histogram: values[", bad, "]: expected 0 .. ", num_bins - 1, ", got ",
               static_cast<int64_t>(values[bad]));
  }
  std::fill(out, out + num_bins, 0);
  for (int64_t run = 0; run < runs.count(); ++run) {
    for (int64_t bin = 0; bin < num_bins; ++bin) out[bin] += counts[static_cast<size_t>(run * num_bins + bin)];
  }
}

Tensor histogram(Tensor values, int64_t num_bins) {
  check_dim("histogram", "values", values, 1);
  DMOE_CHECK(num_bins >= 1, "histogram: num_bins: expected at least 1, got ", num_bins);
  DMOE_CHECK(values.size(0) <= INT32_MAX, "histogram: values: expected fewer than 2**31, got ", values.size(0));
  if (!values.is_contiguous()) values = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(values, {num_bins}, ScalarType::Int);
  dispatch_integer("histogram", "values", values, [&](auto zero) {
    count_values<decltype(zero)>(values, num_bins, static_cast<int32_t*>(out.data_ptr()));
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("histogram", TORCH_BOX(&dmoe::histogram)); }
