// The experts' activation over rows that are there already, and its backward: one pass each; see
// dmoe/ops/row_activation.py. moe_mlp does the same between its products, in cache.
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "moe_rows.h"
#include "pages.h"

namespace dmoe {
namespace {

using std::optional;
using std::string;

struct Shape {
  int64_t rows, width, columns;  // of pre: `columns` is 2 F with a gate
};

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* out(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Shape check(const char* op, const Tensor& pre, const optional<Tensor>& row_scale, bool gated) {
  check_dim(op, "pre", pre, 2), check_contiguous(op, "pre", pre);
  const int64_t halves = gated ? 2 : 1;
  DMOE_CHECK(pre.size(1) % halves == 0, op, ": pre: expected (R, 2 F) with a gate, got ", shape_of(pre));
  if (row_scale) {
    check_contiguous(op, "row_scale", *row_scale);
    check_dtype(op, "row_scale", *row_scale, pre.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    DMOE_CHECK(row_scale->numel() == pre.size(0), op, ": row_scale: expected ", pre.size(0), " numbers, got shape ",
               shape_of(*row_scale));
  }
  return {pre.size(0), pre.size(1) / halves, pre.size(1)};
}

int64_t grain(const Shape& shape) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(shape.columns, 1)); }

Tensor row_activation(Tensor pre, optional<Tensor> row_scale, string activation, bool gated) {
  const Shape shape = check("row_activation", pre, row_scale, gated);
  Tensor hidden = large_empty(pre, {shape.rows, shape.width});
  dispatch_floating("row_activation", "pre", pre, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    const A* scale = row_scale ? data<A>(*row_scale) : nullptr;
    T* to = out<T>(hidden);
    with_activation(activation, gated, [&](auto act) {
      torch::stable::parallel_for(0, shape.rows, grain(shape), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* gate = data<T>(pre) + row * shape.columns;
          activate_row<T>(act, gate, gated ? gate + shape.width : nullptr, scale ? scale[row] : A(1),
                          static_cast<const A*>(nullptr), to + row * shape.width, shape.width);
        }
      });
    });
  });
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> row_activation_backward(Tensor grad_hidden, Tensor pre, optional<Tensor> row_scale,
                                                           string activation, bool gated) {
  const char* op = "row_activation_backward";
  const Shape shape = check(op, pre, row_scale, gated);
  check_contiguous(op, "grad_hidden", grad_hidden), check_dtype(op, "grad_hidden", grad_hidden, pre.scalar_type());
  DMOE_CHECK(grad_hidden.numel() == shape.rows * shape.width, op, ": grad_hidden: expected (", shape.rows, ", ",
             shape.width, "), got ", shape_of(grad_hidden));
  Tensor grad_pre = large_empty_like(pre), hidden = large_empty_like(grad_hidden), dots;
  dispatch_floating(op, "pre", pre, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    constexpr auto kWide = torch::headeronly::CppTypeToScalarType<A>::value;
    dots = torch::stable::new_empty(pre, {shape.rows}, kWide);
    const A* scale = row_scale ? data<A>(*row_scale) : nullptr;
    T *to_pre = out<T>(grad_pre), *to_hidden = out<T>(hidden);
    A* to_dots = out<A>(dots);
    with_activation(activation, gated, [&](auto act) {
      torch::stable::parallel_for(0, shape.rows, grain(shape), [&](int64_t begin, int64_t end) {
        std::vector<A> room(shape.width);
        for (int64_t row = begin; row < end; ++row) {
          const T* gate = data<T>(pre) + row * shape.columns;
          T* grad = to_pre + row * shape.columns;
          to_dots[row] = activate_row_backward<T>(act, gate, gated ? gate + shape.width : nullptr,
                                                  data<T>(grad_hidden) + row * shape.width, scale ? scale[row] : A(1),
                                                  static_cast<const A*>(nullptr), grad, grad + shape.width,
                                                  to_hidden + row * shape.width, room.data(), shape.width);
        }
      });
    });
  });
  return {grad_pre, hidden, dots};
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("row_activation", TORCH_BOX(&dmoe::row_activation));
  m.impl("row_activation_backward", TORCH_BOX(&dmoe::row_activation_backward));
}
