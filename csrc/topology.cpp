// topology on the CPU.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "topology.h"

namespace dmoe {
namespace {

Tensor topology(Tensor expert_offsets, int64_t block_size, int64_t ffn_blocks, int64_t row_blocks) {
  check_topology(expert_offsets, block_size, ffn_blocks, row_blocks);
  if (!expert_offsets.is_contiguous()) expert_offsets = torch::stable::contiguous(expert_offsets);
  const int64_t E = expert_offsets.size(0) - 1;
  const bool is_int = expert_offsets.scalar_type() == ScalarType::Int;
  std::vector<int64_t> first_block;  // of each expert, and the end of the last one
  for (int64_t e = 0; e <= E; ++e) {
    const int64_t offset = is_int ? static_cast<const int32_t*>(expert_offsets.data_ptr())[e]
                                  : static_cast<const int64_t*>(expert_offsets.data_ptr())[e];
    const int64_t least = e == 0 ? 0 : first_block.back() * block_size, most = e == 0 ? 0 : row_blocks * block_size;
    DMOE_CHECK(offset >= least && offset <= most && offset % block_size == 0, "topology: expert_offsets[", e,
               "]: expected a multiple of block_size ", block_size, " in ", least, " .. ", most,
               " (never falling), got ", offset);
    first_block.push_back(offset / block_size);
  }
  Tensor out = torch::stable::new_empty(expert_offsets, {row_blocks * ffn_blocks}, ScalarType::Int);
  int32_t* const columns = static_cast<int32_t*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / ffn_blocks);
  torch::stable::parallel_for(0, row_blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int32_t* const row = columns + r * ffn_blocks;
      // The last expert that begins at or before r; those without rows begin where the next one does.
      const int64_t e = std::upper_bound(first_block.begin(), first_block.end(), r) - first_block.begin() - 1;
      if (e < E) {
        std::iota(row, row + ffn_blocks, static_cast<int32_t>(e * ffn_blocks));
      } else {
        std::fill(row, row + ffn_blocks, -1);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("topology", TORCH_BOX(&dmoe::topology)); }
