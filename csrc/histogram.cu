// histogram on CUDA: every block counts in shared memory when the bins fit there, and adds its counts to the result.
//
// cub::DeviceHistogram would need its levels and sample type spelled for every dtype and two launches as well; integer sums
// do not depend on the order of the atomics, so the result is deterministic. Values outside the bins are not counted.
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "dispatch.h"

namespace dmoe {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxSharedBins = 8192;  // 32 KiB: fits every GPU without asking

template <typename Value, bool kShared>
__global__ void __launch_bounds__(kThreads) count_kernel(const Value* values, int64_t size, int64_t num_bins, int32_t* out) {
  extern __shared__ int32_t counts[];
  if (kShared) {
    for (int64_t bin = threadIdx.x; bin < num_bins; bin += kThreads) counts[bin] = 0;
    __syncthreads();
  }
  int32_t* const target = kShared ? counts : out;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += int64_t{gridDim.x} * kThreads) {
    const int64_t value = static_cast<int64_t>(values[i]);
    if (value >= 0 && value < num_bins) atomicAdd(target + value, 1);
  }
  if (kShared) {
    __syncthreads();
    for (int64_t bin = threadIdx.x; bin < num_bins; bin += kThreads) {
      if (counts[bin] != 0) atomicAdd(out + bin, counts[bin]);
    }
  }
}

Tensor histogram(Tensor values, int64_t num_bins) {
  const DeviceGuard guard(values);
  check_dim("histogram", "values", values, 1);
  DMOE_CHECK(num_bins >= 1, "histogram: num_bins: expected at least 1, got ", num_bins);
  DMOE_CHECK(values.size(0) <= INT32_MAX, "histogram: values: expected fewer than 2**31, got ", values.size(0));
  if (!values.is_contiguous()) values = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(values, {num_bins}, ScalarType::Int);
  int32_t* const counts = static_cast<int32_t*>(out.data_ptr());
  const int64_t size = values.size(0);
  const cudaStream_t stream = current_stream(values);
  DMOE_CUDA_CHECK(cudaMemsetAsync(counts, 0, static_cast<size_t>(num_bins) * sizeof(int32_t), stream));
  dispatch_integer("histogram", "values", values, [&](auto zero) {
    using Value = decltype(zero);
    const Value* const from = static_cast<const Value*>(values.data_ptr());
    if (num_bins <= kMaxSharedBins) {
      // At least 4 values for each counter that a block has to clear and add up.
      const unsigned blocks = grid_for(size, std::max<int64_t>(kThreads * 8, 4 * num_bins), values);
      const size_t bytes = static_cast<size_t>(num_bins) * sizeof(int32_t);
      count_kernel<Value, true><<<blocks, kThreads, bytes, stream>>>(from, size, num_bins, counts);
    } else {
      count_kernel<Value, false><<<grid_for(size, kThreads, values), kThreads, 0, stream>>>(from, size, num_bins, counts);
    }
    DMOE_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) { m.impl("histogram", TORCH_BOX(&dmoe::histogram)); }
