// What the CPU and the CUDA side of topology share: checked arguments.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace dmoe {

inline void check_topology(const Tensor& expert_offsets, int64_t block_size, int64_t ffn_blocks, int64_t row_blocks) {
  check_dim("topology", "expert_offsets", expert_offsets, 1);
  const ScalarType type = expert_offsets.scalar_type();
  DMOE_CHECK(type == ScalarType::Int || type == ScalarType::Long,
             "topology: expert_offsets: expected dtype int32 or int64, got ", toString(type));
  DMOE_CHECK(expert_offsets.size(0) >= 2, "topology: expert_offsets: expected shape (E+1), got ",
             shape_of(expert_offsets));
  DMOE_CHECK(block_size >= 1, "topology: block_size: expected at least 1, got ", block_size);
  DMOE_CHECK(ffn_blocks >= 1, "topology: ffn_blocks_per_expert: expected at least 1, got ", ffn_blocks);
  DMOE_CHECK(row_blocks >= 0, "topology: num_row_blocks: expected at least 0, got ", row_blocks);
  DMOE_CHECK(ffn_blocks <= INT32_MAX / (expert_offsets.size(0) - 1),
             "topology: expected fewer than 2**31 column blocks, got ", expert_offsets.size(0) - 1, " experts of ",
             ffn_blocks);
}

}  // namespace dmoe
