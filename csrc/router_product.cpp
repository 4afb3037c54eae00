// The router's linear, cut by tokens and by experts.
#include "router_product.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "dispatch.h"
#include "gemm.h"
#include "products.h"
#include "simd.h"

namespace dmoe {
namespace {

using std::optional;

constexpr int64_t kTokens = 128, kExperts = 64;  // of one task

template <typename From, typename To>
DMOE_SIMD void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to + i, load(from + i));
}

// `rows` rows of a contiguous tensor from `first` on, as numbers of O: where they are, or in `room`.
template <typename O>
const O* rows_as(const Tensor& tensor, int64_t first, int64_t rows, Scratch& room) {
  const int64_t width = tensor.size(1);
  const O* out = nullptr;
  dispatch_floating("router_product", "operand", tensor, [&](auto zero) {
    using From = decltype(zero);
    const auto* from = static_cast<const From*>(tensor.const_data_ptr()) + first * width;
    if constexpr (std::is_same_v<From, O>) {
      out = from;
    } else {
      O* to = static_cast<O*>(room.get(rows * width * sizeof(O)));
      convert<From, O>(from, to, rows * width);
      out = to;
    }
  });
  return out;
}

template <typename O>
void run(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, Tensor& out, ScalarType dtype) {
  static thread_local Scratch x_room, weight_room, bias_room;
  const int64_t T = x.size(0), H = x.size(1), E = weight.size(0);
  const int64_t token_blocks = (T + kTokens - 1) / kTokens, expert_blocks = (E + kExperts - 1) / kExperts;
  O* to = static_cast<O*>(out.mutable_data_ptr());
  parallel_tasks(token_blocks * expert_blocks, [&](int64_t task) {
    const int64_t t = task / expert_blocks * kTokens, e = task % expert_blocks * kExperts;
    const int64_t tokens = std::min(kTokens, T - t), experts = std::min(kExperts, E - e);
    const O* rows = rows_as<O>(x, t, tokens, x_room);
    const O* weights = rows_as<O>(weight, e, experts, weight_room);
    O* block = to + t * E + e;
    multiply(row_major(block, tokens, experts, E), row_major(rows, tokens, H, H),
             transposed(row_major(weights, experts, H, H)), dtype);
    if (!bias) return;
    const O* added = rows_as<O>(*bias, e, experts, bias_room);
    for (int64_t i = 0; i < tokens; ++i, block += E) {
      for (int64_t c = 0; c < experts; ++c) store(block + c, load(block + c) + load(added + c));
    }
  });
}

Tensor router_product_op(Tensor x, Tensor weight, optional<Tensor> bias, ScalarType dtype) {
  return router_product(x, weight, bias, dtype);
}

}  // namespace

Tensor router_product(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, ScalarType dtype) {
  check_dim("router_product", "x", x, 2), check_dim("router_product", "weight", weight, 2);
  DMOE_CHECK(x.size(1) == weight.size(1), "router_product: expected x (T, H) and weight (E, H), got ", shape_of(x),
             " and ", shape_of(weight));
  const Tensor rows = torch::stable::contiguous(x), weights = torch::stable::contiguous(weight);
  optional<Tensor> column;  // (E, 1), so that it is cut as the weight is
  if (bias) {
    DMOE_CHECK(bias->numel() == weight.size(0), "router_product: bias: expected ", weight.size(0), " numbers, got ",
               bias->numel());
    column = torch::stable::reshape(torch::stable::contiguous(*bias), {weight.size(0), 1});
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)}, dtype);
  switch (dtype) {
    case ScalarType::Double: run<double>(rows, weights, column, out, dtype); break;
    case ScalarType::Float: run<float>(rows, weights, column, out, dtype); break;
    case ScalarType::BFloat16: run<BFloat16>(rows, weights, column, out, dtype); break;
    case ScalarType::Half: run<Half>(rows, weights, column, out, dtype); break;
    default: fail("router_product: dtype: expected a floating-point one, got ", toString(dtype));
  }
  return out;
}

}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("router_product", TORCH_BOX(&dmoe::router_product_op)); }
