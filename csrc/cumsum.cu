// Running sums on CUDA: CUB's scan for one row, one block a row for several, one block for 32 columns the other way.
//
// CUB has no scan down columns, and one launch of its device scan for each row would be a launch for each row. Sums are
// taken in the unsigned type, where wrapping around is defined.
#include <cstdint>
#include <type_traits>

#include <cub/block/block_scan.cuh>
#include <cub/device/device_scan.cuh>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "cumsum.h"
#include "dispatch.h"

namespace dmoe {
namespace {

// A block walks one row, kThreads elements at a time. Few threads serve short rows without idling.
template <bool kExclusive, int kThreads, typename Sum>
__global__ void __launch_bounds__(kThreads) rows_kernel(const Sum* x, Sum* out, int64_t rows, int64_t length) {
  using Scan = cub::BlockScan<Sum, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Sum* const from = x + row * length;
    Sum* const to = out + row * length;
    Sum before = 0;
    for (int64_t base = 0; base < length; base += kThreads) {
      const int64_t i = base + threadIdx.x;
      const Sum value = i < length ? from[i] : Sum{0};
      Sum sum, total;
      Scan(storage).InclusiveSum(value, sum, total);
      if (i < length) to[i] = static_cast<Sum>(before + sum - (kExclusive ? value : Sum{0}));
      before = static_cast<Sum>(before + total);
      __syncthreads();  // before the storage is used again
    }
  }
}

// A block owns 32 columns; each of its rows of threads owns a segment of the length. Segments are summed, the sums are
// scanned, and each segment is summed again from its start.
constexpr int kSegments = 16;

template <bool kExclusive, typename Sum>
__global__ void __launch_bounds__(32 * kSegments) columns_kernel(const Sum* x, Sum* out, int64_t length, int64_t columns) {
  __shared__ Sum sums[kSegments][32];
  const int64_t segment = (length + kSegments - 1) / kSegments;
  const int64_t begin = min(length, threadIdx.y * segment), end = min(length, begin + segment);
  const int64_t groups = (columns + 31) / 32;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t column = group * 32 + threadIdx.x;
    Sum sum = 0;
    if (column < columns) {
      for (int64_t i = begin; i < end; ++i) sum = static_cast<Sum>(sum + x[i * columns + column]);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    Sum before = 0;
    for (unsigned s = 0; s < threadIdx.y; ++s) before = static_cast<Sum>(before + sums[s][threadIdx.x]);
    __syncthreads();  // before the sums of the next group are written
    if (column < columns) {
      for (int64_t i = begin; i < end; ++i) {
        const Sum after = static_cast<Sum>(before + x[i * columns + column]);
        out[i * columns + column] = kExclusive ? before : after;
        before = after;
      }
    }
  }
}

template <bool kExclusive, typename Sum>
void scan(const Tensor& x, const Tensor& out, const CumsumShape& shape) {
  const Sum* const from = static_cast<const Sum*>(x.data_ptr());
  Sum* const to = static_cast<Sum*>(out.data_ptr());
  const cudaStream_t stream = current_stream(x);
  if (shape.inner > 1) {
    const unsigned blocks = grid_for(shape.inner, 32, x);
    columns_kernel<kExclusive><<<blocks, dim3(32, kSegments), 0, stream>>>(from, to, shape.length, shape.inner);
  } else if (shape.outer > 1 || shape.length > INT32_MAX) {
    const unsigned blocks = grid_for(shape.outer, 1, x);
    if (shape.length <= 128) {
      rows_kernel<kExclusive, 32><<<blocks, 32, 0, stream>>>(from, to, shape.outer, shape.length);
    } else {
      rows_kernel<kExclusive, 256><<<blocks, 256, 0, stream>>>(from, to, shape.outer, shape.length);
    }
  } else {
    size_t bytes = 0;
    const int length = static_cast<int>(shape.length);
    const auto run = [&](void* scratch) {
      return kExclusive ? cub::DeviceScan::ExclusiveSum(scratch, bytes, from, to, length, stream)
                        : cub::DeviceScan::InclusiveSum(scratch, bytes, from, to, length, stream);
    };
    DMOE_CUDA_CHECK(run(nullptr));
    const Tensor scratch = workspace(x, static_cast<int64_t>(bytes));
    DMOE_CUDA_CHECK(run(scratch.data_ptr()));
  }
  DMOE_CUDA_CHECK(cudaGetLastError());
}

template <bool kExclusive>
Tensor cumsum(Tensor x, int64_t dim) {
  constexpr const char* kName = kExclusive ? "exclusive_cumsum" : "inclusive_cumsum";
  const DeviceGuard guard(x);
  const CumsumShape shape(kName, x, dim);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return out;
  dispatch_integer(kName, "x", x,
                   [&](auto zero) { scan<kExclusive, std::make_unsigned_t<decltype(zero)>>(x, out, shape); });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) {
  m.impl("inclusive_cumsum", TORCH_BOX(&dmoe::cumsum<false>));
  m.impl("exclusive_cumsum", TORCH_BOX(&dmoe::cumsum<true>));
}
