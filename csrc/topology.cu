// topology on CUDA: every thread writes one column index, and searches the offsets for its row block's expert.
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "topology.h"

namespace dmoe {
namespace {

constexpr int kThreads = 256;

template <typename Offset>
__global__ void __launch_bounds__(kThreads) columns_kernel(const Offset* expert_offsets, int64_t experts,
                                                          int64_t block_size, int64_t ffn_blocks, int64_t size,
                                                          int32_t* out) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / ffn_blocks * block_size;
    int64_t low = 0, high = experts;  // the first expert that ends after the row
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<int64_t>(expert_offsets[middle + 1]) > row) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    out[i] = low < experts ? static_cast<int32_t>(low * ffn_blocks + i % ffn_blocks) : -1;
  }
}

Tensor topology(Tensor expert_offsets, int64_t block_size, int64_t ffn_blocks, int64_t row_blocks) {
  const DeviceGuard guard(expert_offsets);
  check_topology(expert_offsets, block_size, ffn_blocks, row_blocks);
  if (!expert_offsets.is_contiguous()) expert_offsets = torch::stable::contiguous(expert_offsets);
  const int64_t size = row_blocks * ffn_blocks, experts = expert_offsets.size(0) - 1;
  Tensor out = torch::stable::new_empty(expert_offsets, {size}, ScalarType::Int);
  if (size == 0) return out;
  const auto launch = [&](auto* offsets) {
    columns_kernel<<<grid_for(size, kThreads, out), kThreads, 0, current_stream(out)>>>(
        offsets, experts, block_size, ffn_blocks, size, static_cast<int32_t*>(out.data_ptr()));
  };
  if (expert_offsets.scalar_type() == ScalarType::Int) {
    launch(static_cast<const int32_t*>(expert_offsets.data_ptr()));
  } else {
    launch(static_cast<const int64_t*>(expert_offsets.data_ptr()));
  }
  DMOE_CUDA_CHECK(cudaGetLastError());
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) { m.impl("topology", TORCH_BOX(&dmoe::topology)); }
