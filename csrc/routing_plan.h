// What the CPU and the CUDA side of routing_plan share: checked arguments, sizes of the results, the results themselves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace dmoe {

struct PlanShape {
  int64_t num_tokens, top_k, num_experts, num_rows;
  int64_t block_size;
  int64_t capacity;  // int32 maximum when there is none: more than any expert can receive
  bool choice_major, binned;
  int64_t tile_rows, num_tiles;  // 0: nobody asked for tiles
};

struct PlanOutputs {
  int32_t *row_to_token, *row_to_slot, *expert_offsets, *token_rows, *tokens_per_expert;
  int32_t *tiles, *experts_by_load;  // tiles: pairs (expert, first row)
};

using PlanResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct RoutingPlanCall {
  Tensor expert_indices;
  std::optional<Tensor> token_order;
  PlanShape shape;
  Tensor row_to_token, row_to_slot, expert_offsets, token_rows, tokens_per_expert, tiles, experts_by_load;

  RoutingPlanCall(const Tensor& indices, int64_t num_experts, int64_t block_size, std::optional<int64_t> capacity,
                  bool choice_major, const std::optional<Tensor>& order, bool binned, int64_t tile_rows)
      : expert_indices(contiguous_integers("expert_indices", indices)) {
    check_dim("routing_plan", "expert_indices", indices, 2);
    if (order.has_value()) token_order = contiguous_integers("token_order", *order);
    const int64_t T = indices.size(0), K = indices.size(1), E = num_experts;
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    DMOE_CHECK(K >= 1, "routing_plan: expert_indices: expected shape (T, K) with K >= 1, got ", shape_of(indices));
    DMOE_CHECK(E >= 1 && E < kMax, "routing_plan: num_experts: expected 1 .. 2**31 - 2, got ", E);
    DMOE_CHECK(block_size >= 1 && block_size <= kMax, "routing_plan: block_size: expected at least 1, got ", block_size);
    DMOE_CHECK(!capacity.has_value() || *capacity >= 0, "routing_plan: capacity: expected at least 0, got ",
               capacity.value_or(0));
    DMOE_CHECK(!binned || (capacity.has_value() && block_size == 1),
               "routing_plan: binned: expected a capacity and block_size 1, got block_size ", block_size);
    DMOE_CHECK(!order.has_value() || (order->dim() == 1 && order->size(0) == T),
               "routing_plan: token_order: expected shape (", T, "), got ", shape_of(*order));
    DMOE_CHECK(T <= kMax / K, "routing_plan: expected fewer than 2**31 assignments, got expert_indices of shape ",
               shape_of(indices));
    DMOE_CHECK(tile_rows >= 0 && tile_rows <= kMax, "routing_plan: tile_rows: expected at least 0, got ", tile_rows);
    const int64_t limit = std::min(capacity.value_or(kMax), kMax);
    // Products of two numbers below 2**31 fit in int64.
    int64_t rows = binned ? E * limit : std::min(T * K, E * limit);
    if (block_size > 1) rows = (rows + std::min(E, rows) * (block_size - 1)) / block_size * block_size;
    DMOE_CHECK(rows <= kMax, "routing_plan: expected fewer than 2**31 rows (they are counted in int32), got ", rows);
    const int64_t num_tiles = tile_rows == 0 ? 0 : rows / tile_rows + std::min(E, rows);
    DMOE_CHECK(num_tiles <= kMax, "routing_plan: tile_rows: expected fewer than 2**31 tiles, got ", num_tiles);

    shape = PlanShape{T, K, E, rows, block_size, limit, choice_major, binned, tile_rows, num_tiles};
    row_to_token = int32_result(rows);
    row_to_slot = int32_result(rows);
    expert_offsets = int32_result(E + 1);
    token_rows = int32_result(T * K);
    tokens_per_expert = int32_result(E);
    tiles = torch::stable::new_empty(expert_indices, {num_tiles, 2}, ScalarType::Int);
    experts_by_load = int32_result(tile_rows == 0 ? 0 : E);
  }

  PlanOutputs outputs() const {
    const auto data = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); };
    return {data(row_to_token),      data(row_to_slot), data(expert_offsets), data(token_rows),
            data(tokens_per_expert), data(tiles),       data(experts_by_load)};
  }

  PlanResults results() const {
    return {row_to_token, row_to_slot, expert_offsets, token_rows, tokens_per_expert, tiles, experts_by_load};
  }

 private:
  static Tensor contiguous_integers(const char* name, const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    DMOE_CHECK(type == ScalarType::Int || type == ScalarType::Long, "routing_plan: ", name,
               ": expected dtype int32 or int64, got ", toString(type));
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }

  Tensor int32_result(int64_t size) const { return torch::stable::new_empty(expert_indices, {size}, ScalarType::Int); }
};

// Fills the results of a call on the CPU.
void make_plan(const RoutingPlanCall& call);

}  // namespace dmoe
