// The router's linear, cut by tokens and by experts, and its gradients, cut by tokens and by columns of H.
#include "router_product.h"

#include <algorithm>
#include <cstdint>
#include <tuple>
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

constexpr int64_t kTokens = 128, kExperts = 64;         // of one task of the product
constexpr int64_t kColumns = 512, kWeightColumns = 128;  // of one task of the gradients of x and of the weight
constexpr int64_t kPiece = 2048;                         // tokens that are widened at a time for the weight's

template <typename From, typename To>
DMOE_SIMD void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to + i, load(from + i));
}

// A block of a contiguous matrix as numbers of O: where it is, or in `room`.
template <typename O>
Matrix block_as(const Tensor& tensor, int64_t row, int64_t rows, int64_t column, int64_t columns, Scratch& room) {
  const int64_t width = tensor.size(1);
  Matrix out{};
  with_floating(tensor.scalar_type(), [&](auto zero) {
    using From = decltype(zero);
    const auto* from = static_cast<const From*>(tensor.const_data_ptr()) + row * width + column;
    if constexpr (std::is_same_v<From, O>) {
      out = row_major(from, rows, columns, width);
    } else {
      O* to = static_cast<O*>(room.get(rows * columns * sizeof(O)));
      for (int64_t r = 0; r < rows; ++r) convert<From, O>(from + r * width, to + r * columns, columns);
      out = row_major(to, rows, columns, columns);
    }
  });
  return out;
}
template <typename O>
Matrix rows_as(const Tensor& tensor, int64_t first, int64_t rows, Scratch& room) {
  return block_as<O>(tensor, first, rows, 0, tensor.size(1), room);
}

// Calls fn(out) for a block of a result whose numbers are made in O: where it belongs, or beside it.
template <typename O, typename Function>
void into_block(Tensor& result, int64_t row, int64_t rows, int64_t column, int64_t columns, Scratch& room,
                const Function& fn) {
  const int64_t width = result.size(1);
  with_floating(result.scalar_type(), [&](auto zero) {
    using To = decltype(zero);
    auto* to = static_cast<To*>(result.mutable_data_ptr()) + row * width + column;
    if constexpr (std::is_same_v<To, O>) {
      fn(row_major(to, rows, columns, width));
    } else {
      O* made = static_cast<O*>(room.get(rows * columns * sizeof(O)));
      fn(row_major(made, rows, columns, columns));
      for (int64_t r = 0; r < rows; ++r) convert<O, To>(made + r * columns, to + r * width, columns);
    }
  });
}

template <typename O>
void run(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, Tensor& out, ScalarType dtype) {
  static thread_local Scratch x_room, weight_room, bias_room;
  const int64_t T = x.size(0), E = weight.size(0);
  const int64_t token_blocks = (T + kTokens - 1) / kTokens, expert_blocks = (E + kExperts - 1) / kExperts;
  O* to = static_cast<O*>(out.mutable_data_ptr());
  parallel_tasks(token_blocks * expert_blocks, [&](int64_t task) {
    const int64_t t = task / expert_blocks * kTokens, e = task % expert_blocks * kExperts;
    const int64_t tokens = std::min(kTokens, T - t), experts = std::min(kExperts, E - e);
    O* block = to + t * E + e;
    multiply(row_major(block, tokens, experts, E), rows_as<O>(x, t, tokens, x_room),
             transposed(rows_as<O>(weight, e, experts, weight_room)), dtype);
    if (!bias) return;
    const O* added = static_cast<const O*>(rows_as<O>(*bias, e, experts, bias_room).data);
    for (int64_t i = 0; i < tokens; ++i, block += E) {
      for (int64_t c = 0; c < experts; ++c) store(block + c, load(block + c) + load(added + c));
    }
  });
}

// grad_x = grad @ weight and grad_weight = grad^T @ x, for grad (T, E) of O.
template <typename O>
void run_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, Tensor& grad_x, Tensor& grad_weight,
                  ScalarType dtype) {
  static thread_local Scratch operand_room, result_room;
  const int64_t T = x.size(0), H = x.size(1), E = weight.size(0);
  const int64_t column_blocks = (H + kColumns - 1) / kColumns, of_x = (T + kTokens - 1) / kTokens * column_blocks;
  const int64_t of_weight = (H + kWeightColumns - 1) / kWeightColumns;
  const O* from = static_cast<const O*>(grad.const_data_ptr());
  // A sum of half precision is made in one piece: each more would round it once more.
  const bool in_pieces = std::is_same_v<O, float> || std::is_same_v<O, double>;
  const int64_t piece = in_pieces ? std::min(T, kPiece) : T;
  parallel_tasks(of_weight + of_x, [&](int64_t task) {
    if (task < of_weight) {
      const int64_t h = task * kWeightColumns, columns = std::min(kWeightColumns, H - h);
      into_block<O>(grad_weight, 0, E, h, columns, result_room, [&](const Matrix& out) {
        for (int64_t t = 0; t < T; t += piece) {
          const int64_t tokens = std::min(piece, T - t);
          multiply(out, transposed(row_major(from + t * E, tokens, E, E)),
                   block_as<O>(x, t, tokens, h, columns, operand_room), dtype, t > 0);
        }
      });
      return;
    }
    const int64_t block = task - of_weight, t = block / column_blocks * kTokens, h = block % column_blocks * kColumns;
    const int64_t tokens = std::min(kTokens, T - t), columns = std::min(kColumns, H - h);
    into_block<O>(grad_x, t, tokens, h, columns, result_room, [&](const Matrix& out) {
      multiply(out, row_major(from + t * E, tokens, E, E), block_as<O>(weight, 0, E, h, columns, operand_room), dtype);
    });
  });
}

void check_matrix(const char* op, const char* name, const Tensor& tensor) {
  check_dim(op, name, tensor, 2), check_floating(op, name, tensor);
}

std::tuple<Tensor, Tensor> router_product_backward(Tensor grad, Tensor x, Tensor weight) {
  constexpr const char* kOp = "router_product_backward";
  check_matrix(kOp, "grad", grad), check_matrix(kOp, "x", x), check_matrix(kOp, "weight", weight);
  DMOE_CHECK(x.size(1) == weight.size(1) && grad.size(0) == x.size(0) && grad.size(1) == weight.size(0), kOp,
             ": expected grad (T, E), x (T, H) and weight (E, H), got ", shape_of(grad), ", ", shape_of(x), " and ",
             shape_of(weight));
  const Tensor grads = torch::stable::contiguous(grad), rows = torch::stable::contiguous(x);
  const Tensor weights = torch::stable::contiguous(weight);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor grad_weight = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  if (x.size(0) == 0) return {grad_x, torch::stable::zero_(grad_weight)};
  with_floating(grads.scalar_type(), [&](auto zero) {
    run_backward<decltype(zero)>(grads, rows, weights, grad_x, grad_weight, grads.scalar_type());
  });
  return {grad_x, grad_weight};
}

Tensor router_product_op(Tensor x, Tensor weight, optional<Tensor> bias, ScalarType dtype) {
  return router_product(x, weight, bias, dtype);
}

}  // namespace

Tensor router_product(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, ScalarType dtype) {
  check_matrix("router_product", "x", x), check_matrix("router_product", "weight", weight);
  DMOE_CHECK(x.size(1) == weight.size(1), "router_product: expected x (T, H) and weight (E, H), got ", shape_of(x),
             " and ", shape_of(weight));
  const Tensor rows = torch::stable::contiguous(x), weights = torch::stable::contiguous(weight);
  optional<Tensor> column;  // (E, 1), so that it is cut as the weight is
  if (bias) {
    check_floating("router_product", "bias", *bias);
    DMOE_CHECK(bias->numel() == weight.size(0), "router_product: bias: expected ", weight.size(0), " numbers, got ",
               bias->numel());
    column = torch::stable::reshape(torch::stable::contiguous(*bias), {weight.size(0), 1});
  }
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)}, dtype);
  const bool known = with_floating(dtype, [&](auto zero) { run<decltype(zero)>(rows, weights, column, out, dtype); });
  DMOE_CHECK(known, "router_product: dtype: expected a floating-point one, got ", toString(dtype));
  return out;
}

}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("router_product", TORCH_BOX(&dmoe::router_product_op));
  m.impl("router_product_backward", TORCH_BOX(&dmoe::router_product_backward));
}
