// unpermute and its backward on CUDA, without atomics: a token gathers its rows, a row gathers its token's gradient.
#include <climits>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "unpermute.h"

namespace dmoe {
namespace {

constexpr int kThreads = 128;

template <typename Scalar>
using Sum = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename Scalar>
__device__ Sum<Scalar> widen(Scalar value) { return static_cast<Sum<Scalar>>(value); }
template <typename Scalar>
__device__ Scalar narrow(Sum<Scalar> value) { return static_cast<Scalar>(value); }

// kWidth neighbouring elements, one memory access where kWidth * sizeof(Scalar) is up to 16 bytes.
template <typename Scalar, int kWidth>
struct alignas(sizeof(Scalar) * kWidth) Pack {
  Scalar values[kWidth];
};

// One token a block. An index out of range counts as dropped: looking on the host would need a transfer.
template <typename Scalar, int kWidth>
__global__ void __launch_bounds__(kThreads)
    unpermute_kernel(const Scalar* __restrict__ rows, const Sum<Scalar>* __restrict__ weights,
                     const int32_t* __restrict__ token_offsets, const int32_t* __restrict__ token_rows,
                     Scalar* __restrict__ out, int64_t num_rows, int64_t hidden, int64_t assignments) {
  using Words = Pack<Scalar, kWidth>;
  const int64_t token = blockIdx.x;
  const int64_t first = max(int64_t{token_offsets[token]}, int64_t{0});
  const int64_t last = min(int64_t{token_offsets[token + 1]}, assignments);
  for (int64_t column = int64_t{threadIdx.x} * kWidth; column < hidden; column += int64_t{kThreads} * kWidth) {
    Sum<Scalar> sums[kWidth] = {};
    for (int64_t j = first; j < last; ++j) {
      const int64_t row = token_rows[j];
      if (row < 0 || row >= num_rows) continue;
      const Sum<Scalar> weight = weights ? weights[j] : Sum<Scalar>(1);
      const Words words = *reinterpret_cast<const Words*>(rows + row * hidden + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] += weight * widen(words.values[i]);
    }
    Words result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.values[i] = narrow<Scalar>(sums[i]);
    *reinterpret_cast<Words*>(out + token * hidden + column) = result;
  }
}

// One row a block: its gradient, and the dot product that is the gradient of its weight. The sum goes along fixed
// strides, lanes and warps, so it has one order. grad_weights comes in zeroed, for the dropped assignments.
template <typename Scalar, int kWidth>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Scalar* __restrict__ grad, const Scalar* __restrict__ rows,
                    const Sum<Scalar>* __restrict__ weights, const int32_t* __restrict__ row_to_token,
                    const int32_t* __restrict__ row_to_slot, const int32_t* __restrict__ token_offsets,
                    Scalar* __restrict__ grad_rows, Sum<Scalar>* __restrict__ grad_weights, int64_t tokens,
                    int64_t hidden, int64_t assignments) {
  using Words = Pack<Scalar, kWidth>;
  const int64_t row = blockIdx.x;
  const int64_t token = row_to_token[row];
  int64_t assignment = -1;
  if (token >= 0 && token < tokens) {
    const int64_t first = token_offsets[token], last = token_offsets[token + 1];
    const int64_t mine = first + row_to_slot[row];
    if (first >= 0 && mine >= first && mine < last && mine < assignments) assignment = mine;
  }
  grad_rows += row * hidden;
  if (assignment < 0) {
    for (int64_t column = int64_t{threadIdx.x} * kWidth; column < hidden; column += int64_t{kThreads} * kWidth) {
      *reinterpret_cast<Words*>(grad_rows + column) = Words{};
    }
    return;
  }
  grad += token * hidden;
  rows += row * hidden;
  const Sum<Scalar> weight = weights[assignment];
  Sum<Scalar> dot = 0;
  for (int64_t column = int64_t{threadIdx.x} * kWidth; column < hidden; column += int64_t{kThreads} * kWidth) {
    const Words dy = *reinterpret_cast<const Words*>(grad + column);
    const Words values = *reinterpret_cast<const Words*>(rows + column);
    Words result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Sum<Scalar> g = widen(dy.values[i]);
      dot += g * widen(values.values[i]);
      result.values[i] = narrow<Scalar>(weight * g);
    }
    *reinterpret_cast<Words*>(grad_rows + column) = result;
  }
  for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
  __shared__ Sum<Scalar> of_warp[kThreads / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = dot;
  __syncthreads();
  if (threadIdx.x == 0) {
    Sum<Scalar> total = 0;
    for (const Sum<Scalar> part : of_warp) total += part;
    grad_weights[assignment] = total;
  }
}

ScalarType sum_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls fn(Scalar(), width) with the widest access that rows of `hidden` elements at these addresses allow.
template <typename Scalar, typename Function>
void for_width(int64_t hidden, uintptr_t addresses, const Function& fn) {
  constexpr int kWide = 16 / sizeof(Scalar);
  if (hidden % kWide == 0 && addresses % 16 == 0) {
    fn(Scalar(), std::integral_constant<int, kWide>());
  } else {
    fn(Scalar(), std::integral_constant<int, 1>());
  }
}

template <typename Function>
void for_dtype(const char* op, const Tensor& rows, uintptr_t addresses, const Function& fn) {
  const int64_t hidden = rows.size(1);
  switch (rows.scalar_type()) {
    case ScalarType::Float: return for_width<float>(hidden, addresses, fn);
    case ScalarType::Double: return for_width<double>(hidden, addresses, fn);
    case ScalarType::BFloat16: return for_width<__nv_bfloat16>(hidden, addresses, fn);
    case ScalarType::Half: return for_width<__half>(hidden, addresses, fn);
    default: fail(op, ": rows: expected a floating-point tensor, got ", toString(rows.scalar_type()));
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

uintptr_t address(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()); }

Tensor unpermute(const Tensor& rows, const std::optional<Tensor>& gate_weights, const Tensor& row_to_token,
                 const std::optional<Tensor>& row_to_slot, const Tensor& token_offsets, const Tensor& token_rows) {
  check_dim("unpermute", "rows", rows, 2);
  DeviceGuard guard(rows);
  const Tensor source = torch::stable::contiguous(rows);
  const Tensor offsets = int32_vector("unpermute", "token_offsets", token_offsets);
  const Tensor rows_of = int32_vector("unpermute", "token_rows", token_rows);
  DMOE_CHECK(offsets.size(0) >= 1, "unpermute: token_offsets: expected a leading 0, got an empty tensor");
  const int64_t tokens = offsets.size(0) - 1, hidden = rows.size(1), assignments = token_rows.size(0);
  std::optional<Tensor> weights;
  if (gate_weights) weights = prepare_weights("unpermute", *gate_weights, assignments, sum_type(rows));
  Tensor out = torch::stable::new_empty(source, {tokens, hidden});
  if (tokens == 0 || hidden == 0) return out;
  DMOE_CHECK(tokens <= INT_MAX, "unpermute: token_offsets: expected fewer than 2**31 tokens, got ", tokens);

  for_dtype("unpermute", rows, address(source) | address(out), [&](auto scalar, auto width) {
    using Scalar = decltype(scalar);
    unpermute_kernel<Scalar, width.value><<<static_cast<unsigned>(tokens), kThreads, 0, current_stream(rows)>>>(
        data<Scalar>(source), weights ? data<Sum<Scalar>>(*weights) : nullptr, data<int32_t>(offsets),
        data<int32_t>(rows_of), data<Scalar>(out), rows.size(0), hidden, assignments);
    DMOE_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows, const Tensor& gate_weights,
                                              const Tensor& row_to_token, const Tensor& row_to_slot,
                                              const Tensor& token_offsets, const Tensor& token_rows) {
  constexpr const char* kOp = "unpermute_backward";
  check_dim(kOp, "grad", grad, 2);
  check_dim(kOp, "rows", rows, 2);
  check_dtype(kOp, "grad", grad, rows.scalar_type());
  DeviceGuard guard(rows);
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor source = torch::stable::contiguous(rows);
  const Tensor tokens_of = int32_vector(kOp, "row_to_token", row_to_token);
  const Tensor slots_of = int32_vector(kOp, "row_to_slot", row_to_slot);
  const Tensor offsets = int32_vector(kOp, "token_offsets", token_offsets);
  const int64_t num_rows = rows.size(0), hidden = rows.size(1), tokens = grad.size(0);
  const int64_t assignments = token_rows.size(0);
  DMOE_CHECK(grad.size(1) == hidden && offsets.size(0) == tokens + 1 && tokens_of.size(0) == num_rows &&
                 slots_of.size(0) == num_rows,
             kOp, ": expected grad (T, H), rows (R, H), row_to_token (R,), row_to_slot (R,), token_offsets (T + 1,); "
             "got ", shape_of(grad), ", ", shape_of(rows), ", ", shape_of(row_to_token), ", ",
             shape_of(row_to_slot), ", ", shape_of(token_offsets));
  const Tensor weights = prepare_weights(kOp, gate_weights, assignments, sum_type(rows));
  Tensor grad_rows = torch::stable::new_empty(source, {num_rows, hidden});
  Tensor grad_weights = torch::stable::new_zeros(weights, {assignments});
  if (num_rows > 0) {
    DMOE_CHECK(num_rows <= INT_MAX, kOp, ": rows: expected fewer than 2**31 rows, got ", num_rows);
    const uintptr_t addresses = address(upstream) | address(source) | address(grad_rows);
    for_dtype(kOp, rows, addresses, [&](auto scalar, auto width) {
      using Scalar = decltype(scalar);
      backward_kernel<Scalar, width.value><<<static_cast<unsigned>(num_rows), kThreads, 0, current_stream(rows)>>>(
          data<Scalar>(upstream), data<Scalar>(source), data<Sum<Scalar>>(weights), data<int32_t>(tokens_of),
          data<int32_t>(slots_of), data<int32_t>(offsets), data<Scalar>(grad_rows), data<Sum<Scalar>>(grad_weights),
          tokens, hidden, assignments);
      DMOE_CUDA_CHECK(cudaGetLastError());
    });
  }
  return {grad_rows, torch::stable::to(grad_weights, gate_weights.scalar_type())};
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) {
  m.impl("unpermute", TORCH_BOX(&dmoe::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&dmoe::unpermute_backward));
}
