// grouped_gemm and its weight gradient on CUDA, in plain CUDA C++: for float64, and where there is no Triton. Right for
// every dtype and every stride, at the speed of the ordinary arithmetic units (float32 sums, or float64 for float64).
// The fast ones, on tensor cores, are in dmoe/kernels/grouped_gemm.py.
//
// The host never learns the rows per expert: the grid has the most tiles that R rows on E experts can need, and each
// block finds its own expert in the offsets. Offsets are cut to 0 .. R on the device, so no offset reads out of bounds.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"

namespace dmoe {
namespace {

constexpr int kTile = 64;      // rows and columns of an output tile
constexpr int kDepth = 16;     // of the summed dimension, staged in shared memory at a time
constexpr int kThreads = 256;  // 16 x 16, each with 4 x 4 outputs, 16 apart so that neighbours write neighbours
constexpr int kPerThread = 4;

template <typename Scalar>
using Sum = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// A matrix on the device; strides count elements.
template <typename Scalar>
struct View {
  const Scalar* data;
  int64_t row_stride, col_stride;
};

// Copies rows [row, row + kTile) x columns [col, col + kDepth) of `from` into `to[column][row]`, zeros beyond the ends.
// Neighbouring threads read along the dimension whose stride is 1.
template <typename Scalar>
__device__ void load_tile(Sum<Scalar> (*to)[kTile + 1], const View<Scalar>& from, int64_t row, int64_t rows,
                          int64_t col, int64_t cols) {
  const bool along_columns = from.col_stride == 1;
#pragma unroll
  for (int step = 0; step < kTile * kDepth / kThreads; ++step) {
    const int i = threadIdx.x + step * kThreads;
    const int c = along_columns ? i % kDepth : i / kTile;
    const int r = along_columns ? i / kDepth : i % kTile;
    const bool inside = row + r < rows && col + c < cols;
    to[c][r] = inside ? static_cast<Sum<Scalar>>(from.data[(row + r) * from.row_stride + (col + c) * from.col_stride])
                      : Sum<Scalar>(0);
  }
}

// out[i][j] = sum_k a[i][k] * b[j][k] for the tile at (row, col) of an output of rows x cols.
template <typename Scalar>
__device__ void multiply_tile(const View<Scalar>& a, const View<Scalar>& b, Scalar* out, int64_t out_stride,
                              int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t depth) {
  __shared__ Sum<Scalar> a_tile[kDepth][kTile + 1], b_tile[kDepth][kTile + 1];  // + 1: no two of a column in one bank
  const int thread_row = threadIdx.x / 16, thread_col = threadIdx.x % 16;
  Sum<Scalar> sums[kPerThread][kPerThread] = {};
  for (int64_t k = 0; k < depth; k += kDepth) {
    load_tile(a_tile, a, row, rows, k, depth);
    load_tile(b_tile, b, col, cols, k, depth);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kDepth; ++step) {
      Sum<Scalar> left[kPerThread], right[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        left[i] = a_tile[step][thread_row + 16 * i];
        right[i] = b_tile[step][thread_col + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sums[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t r = row + thread_row + 16 * i;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t c = col + thread_col + 16 * j;
      if (r < rows && c < cols) out[r * out_stride + c] = static_cast<Scalar>(sums[i][j]);
    }
  }
}

// Offset i, within 0 .. rows; what lies beyond the last expert is one more segment, the tail, which ends at `rows`.
__device__ int64_t offset_at(const int32_t* expert_offsets, int i, int num_experts, int64_t rows) {
  if (i > num_experts) return rows;
  return min(max(int64_t{expert_offsets[i]}, int64_t{0}), rows);
}

struct RowTile {
  int expert;  // num_experts for the tail
  int64_t first_row, end_row;
};

// Which rows tile number `tile` covers, found by the first warp: 32 segments a step, their tile counts summed by
// shuffles. Past the last tile it covers no row.
__device__ RowTile find_row_tile(const int32_t* expert_offsets, int num_experts, int64_t rows, int64_t tile) {
  __shared__ RowTile found;
  if (threadIdx.x == 0) found = {num_experts, rows, rows};
  __syncthreads();
  if (threadIdx.x < 32) {
    int64_t before = 0;  // tiles of the segments of earlier steps
    for (int base = 0; base <= num_experts && before <= tile; base += 32) {
      const int segment = base + static_cast<int>(threadIdx.x);
      int64_t first = rows, end = rows;
      if (segment <= num_experts) {
        first = offset_at(expert_offsets, segment, num_experts, rows);
        end = offset_at(expert_offsets, segment + 1, num_experts, rows);
      }
      const int64_t tiles = end > first ? (end - first + kTile - 1) / kTile : 0;
      int64_t through = tiles;
      for (int offset = 1; offset < 32; offset *= 2) {
        const int64_t left = __shfl_up_sync(0xffffffffu, through, offset);
        if (threadIdx.x >= offset) through += left;
      }
      const int64_t mine = tile - (before + through - tiles);
      if (mine >= 0 && mine < tiles) found = {segment, first + mine * kTile, end};
      before += __shfl_sync(0xffffffffu, through, 31);
    }
  }
  __syncthreads();
  return found;
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const Scalar* __restrict__ a, int64_t a_row_stride, const Scalar* __restrict__ b,
                   int64_t b_expert_stride, int64_t b_column_stride, int64_t b_inner_stride,
                   const int32_t* __restrict__ expert_offsets, Scalar* __restrict__ out, int num_experts, int64_t rows,
                   int64_t inner, int64_t columns) {
  const RowTile tile = find_row_tile(expert_offsets, num_experts, rows, blockIdx.x);
  if (tile.first_row >= tile.end_row) return;
  const bool tail = tile.expert == num_experts;  // no expert: a sum over nothing, which writes the zeros
  const View<Scalar> left{a, a_row_stride, 1};
  const View<Scalar> right{b + (tail ? 0 : tile.expert * b_expert_stride), b_column_stride, b_inner_stride};
  multiply_tile(left, right, out, columns, tile.first_row, tile.end_row, int64_t{blockIdx.y} * kTile, columns,
                tail ? 0 : inner);
}

template <typename Scalar>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(const Scalar* __restrict__ a, int64_t a_row_stride, const Scalar* __restrict__ b,
                  int64_t b_row_stride, const int32_t* __restrict__ expert_offsets, Scalar* __restrict__ out,
                  int num_experts, int64_t rows, int64_t height, int64_t columns) {
  const int expert = blockIdx.z;
  const int64_t first = offset_at(expert_offsets, expert, num_experts, rows);
  const int64_t end = max(offset_at(expert_offsets, expert + 1, num_experts, rows), first);
  // The summed dimension is the rows, so both factors are read transposed.
  const View<Scalar> left{a + first * a_row_stride, 1, a_row_stride};
  const View<Scalar> right{b + first * b_row_stride, 1, b_row_stride};
  multiply_tile(left, right, out + expert * height * columns, columns, int64_t{blockIdx.x} * kTile, height,
                int64_t{blockIdx.y} * kTile, columns, end - first);
}

template <typename Function>
void for_dtype(const char* op, const Tensor& a, const Tensor& b, const Function& fn) {
  check_dtype(op, "b", b, a.scalar_type());
  switch (a.scalar_type()) {
    case ScalarType::Float: return fn(float());
    case ScalarType::Double: return fn(double());
    case ScalarType::BFloat16: return fn(__nv_bfloat16());
    case ScalarType::Half: return fn(__half());
    default: fail(op, ": a: expected float32, float64, bfloat16 or float16, got ", toString(a.scalar_type()));
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

Tensor offsets_for(const char* op, const Tensor& expert_offsets, int64_t num_experts) {
  check_dim(op, "expert_offsets", expert_offsets, 1);
  check_dtype(op, "expert_offsets", expert_offsets, ScalarType::Int);
  DMOE_CHECK(expert_offsets.size(0) == num_experts + 1, op, ": expert_offsets: expected shape (", num_experts + 1,
             ",), one more than experts, got ", shape_of(expert_offsets));
  return torch::stable::contiguous(expert_offsets);
}

Tensor with_unit_columns(const Tensor& matrix) {
  return matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

void check_grid(const char* op, int64_t x, int64_t y, int64_t z) {
  DMOE_CHECK(x <= INT_MAX && y <= 65535 && z <= 65535, op, ": expected fewer tiles than a grid holds, got ", x, " x ",
             y, " x ", z);
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, bool trans_b) {
  constexpr const char* kOp = "grouped_gemm";
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "b", b, 3);
  const int64_t rows = a.size(0), inner = a.size(1), num_experts = b.size(0);
  const int column_dim = trans_b ? 1 : 2, inner_dim = trans_b ? 2 : 1;
  const int64_t columns = b.size(column_dim);
  DMOE_CHECK(b.size(inner_dim) == inner, kOp, ": b: expected ", trans_b ? "(E, N, Kd)" : "(E, Kd, N)",
             " with Kd = ", inner, " for a of shape ", shape_of(a), ", got ", shape_of(b));
  DeviceGuard guard(a);
  const Tensor offsets = offsets_for(kOp, expert_offsets, num_experts);
  Tensor out = torch::stable::new_empty(a, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  const Tensor left = with_unit_columns(a);
  // Each of the E experts, and the tail, leaves at most one tile that is not full.
  const int64_t row_tiles = rows / kTile + std::min(rows, num_experts + 1);
  check_grid(kOp, row_tiles, tiles_of(columns), 1);
  for_dtype(kOp, a, b, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(tiles_of(columns)));
    product_kernel<Scalar><<<grid, kThreads, 0, current_stream(a)>>>(
        data<Scalar>(left), left.stride(0), data<Scalar>(b), b.stride(0), b.stride(column_dim), b.stride(inner_dim),
        data<int32_t>(offsets), data<Scalar>(out), static_cast<int>(num_experts), rows, inner, columns);
    DMOE_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

Tensor grouped_gemm_weight(const Tensor& a, const Tensor& b, const Tensor& expert_offsets, int64_t num_experts) {
  constexpr const char* kOp = "grouped_gemm_weight";
  check_dim(kOp, "a", a, 2);
  check_dim(kOp, "b", b, 2);
  const int64_t rows = a.size(0), height = a.size(1), columns = b.size(1);
  DMOE_CHECK(b.size(0) == rows, kOp, ": b: expected as many rows as a, ", rows, ", got shape ", shape_of(b));
  DMOE_CHECK(num_experts >= 0, kOp, ": num_experts: expected 0 or more, got ", num_experts);
  DeviceGuard guard(a);
  const Tensor offsets = offsets_for(kOp, expert_offsets, num_experts);
  Tensor out = torch::stable::new_empty(a, {num_experts, height, columns});
  if (num_experts == 0 || height == 0 || columns == 0) return out;
  const Tensor left = with_unit_columns(a), right = with_unit_columns(b);
  check_grid(kOp, tiles_of(height), tiles_of(columns), num_experts);
  for_dtype(kOp, a, b, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const dim3 grid(static_cast<unsigned>(tiles_of(height)), static_cast<unsigned>(tiles_of(columns)),
                    static_cast<unsigned>(num_experts));
    weight_kernel<Scalar><<<grid, kThreads, 0, current_stream(a)>>>(
        data<Scalar>(left), left.stride(0), data<Scalar>(right), right.stride(0), data<int32_t>(offsets),
        data<Scalar>(out), static_cast<int>(num_experts), rows, height, columns);
    DMOE_CUDA_CHECK(cudaGetLastError());
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) {
  m.impl("grouped_gemm_portable", TORCH_BOX(&dmoe::grouped_gemm));
  m.impl("grouped_gemm_weight_portable", TORCH_BOX(&dmoe::grouped_gemm_weight));
}
