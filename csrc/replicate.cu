// replicate and its transpose on CUDA.
//
// Bins are never trusted: ends are clamped to 0 .. length, and a search that runs into falling bins still ends inside them.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <cub/block/block_reduce.cuh>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "replicate.h"

namespace dmoe {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 128;

// Each thread finds the expert of one position, and writes that position of every row.
template <typename Value, typename Bin>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const Value* x, const Bin* bins, int64_t rows, int64_t experts, int64_t length, Value* out) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < length; i += int64_t{gridDim.x} * kThreads) {
    int64_t low = 0, high = experts;  // the first expert that ends after i
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<int64_t>(bins[middle]) > i) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    for (int64_t b = blockIdx.y; b < rows; b += gridDim.y) {
      out[b * length + i] = low < experts ? x[b * experts + low] : Value{0};
    }
  }
}

// One block sums one segment: which thread adds what, and the tree that joins them, do not depend on timing.
template <typename Value, typename Bin>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const Value* grad, const Bin* bins, int64_t rows, int64_t experts, int64_t length, Value* out) {
  using Sum = std::conditional_t<std::is_same_v<Value, double>, double, float>;
  using Reduce = cub::BlockReduce<Sum, kSumThreads>;
  __shared__ typename Reduce::TempStorage storage;
  for (int64_t segment = blockIdx.x; segment < rows * experts; segment += gridDim.x) {
    const int64_t b = segment / experts, e = segment % experts;
    const int64_t begin = e == 0 ? 0 : max(int64_t{0}, min(length, static_cast<int64_t>(bins[e - 1])));
    const int64_t end = max(int64_t{0}, min(length, static_cast<int64_t>(bins[e])));
    Sum sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) sum += static_cast<Sum>(grad[b * length + i]);
    sum = Reduce(storage).Sum(sum);
    if (threadIdx.x == 0) out[segment] = static_cast<Value>(sum);
    __syncthreads();  // before the storage is used again
  }
}

template <typename Body>
void with_bins(const Tensor& bins, const Body& body) {
  if (bins.scalar_type() == ScalarType::Int) {
    body(static_cast<const int32_t*>(bins.data_ptr()));
  } else {
    body(static_cast<const int64_t*>(bins.data_ptr()));
  }
}

template <typename Value>
void copy_values(const Tensor& x, const Tensor& bins, int64_t length, const Tensor& out) {
  const int64_t rows = x.size(0);
  const dim3 blocks(grid_for(length, kThreads, x), static_cast<unsigned>(std::min<int64_t>(rows, 64)));
  with_bins(bins, [&](auto* ends) {
    copy_kernel<<<blocks, kThreads, 0, current_stream(x)>>>(static_cast<const Value*>(x.data_ptr()), ends, rows, x.size(1),
                                                           length, static_cast<Value*>(out.data_ptr()));
  });
  DMOE_CUDA_CHECK(cudaGetLastError());
}

Tensor replicate(Tensor x, Tensor bins, int64_t length) {
  const DeviceGuard guard(x);
  check_replicate("replicate", x, bins);
  DMOE_CHECK(bins.size(0) == x.size(1), "replicate: bins: expected shape (", x.size(1), "), got ", shape_of(bins));
  DMOE_CHECK(length >= 0, "replicate: length: expected at least 0, got ", length);
  x = as_contiguous(x);
  bins = as_contiguous(bins);
  Tensor out = torch::stable::new_empty(x, {x.size(0), length});
  if (out.numel() == 0) return out;
  switch (x.scalar_type()) {
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short:
      copy_values<int16_t>(x, bins, length, out);
      break;
    case ScalarType::Float:
    case ScalarType::Int:
      copy_values<int32_t>(x, bins, length, out);
      break;
    case ScalarType::Double:
    case ScalarType::Long:
      copy_values<int64_t>(x, bins, length, out);
      break;
    default:
      fail("replicate: x: expected a float dtype or int16, int32, int64, got ", toString(x.scalar_type()));
  }
  return out;
}

template <typename Value>
void sum_values(const Tensor& grad, const Tensor& bins, const Tensor& out) {
  const unsigned blocks = grid_for(out.numel(), 1, grad);
  with_bins(bins, [&](auto* ends) {
    sum_kernel<<<blocks, kSumThreads, 0, current_stream(grad)>>>(static_cast<const Value*>(grad.data_ptr()), ends,
                                                                grad.size(0), out.size(1), grad.size(1),
                                                                static_cast<Value*>(out.data_ptr()));
  });
  DMOE_CUDA_CHECK(cudaGetLastError());
}

Tensor replicate_backward(Tensor grad, Tensor bins) {
  const DeviceGuard guard(grad);
  check_replicate("replicate_backward", grad, bins);
  grad = as_contiguous(grad);
  bins = as_contiguous(bins);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), bins.size(0)});
  if (out.numel() == 0) return out;
  switch (grad.scalar_type()) {
    case ScalarType::Half:
      sum_values<__half>(grad, bins, out);
      break;
    case ScalarType::BFloat16:
      sum_values<__nv_bfloat16>(grad, bins, out);
      break;
    case ScalarType::Float:
      sum_values<float>(grad, bins, out);
      break;
    case ScalarType::Double:
      sum_values<double>(grad, bins, out);
      break;
    default:
      fail("replicate_backward: grad: expected a float dtype, got ", toString(grad.scalar_type()));
  }
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) {
  m.impl("replicate", TORCH_BOX(&dmoe::replicate));
  m.impl("replicate_backward", TORCH_BOX(&dmoe::replicate_backward));
}
