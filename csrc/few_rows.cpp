// Thin products: which kernel of few_rows_kernels.h and few_rows_bf16.h, on factors laid out for it.
#pragma GCC diagnostic ignored "-Wpsabi"                // vectors are passed between functions that are inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics
#include "few_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_level.h"
#include "dispatch.h"
#include "few_rows_bf16.h"
#include "few_rows_kernels.h"

namespace dmoe {
namespace few {

// Row after row, with zeros behind it, in the order in which the steps of dot read them.
template <int W, typename T>
DMOE_INLINE void pack_rows(const Matrix& a, float* to) {
  constexpr int V = kDotVectors<T>, kStep = V * W;
  const int64_t stride = packed_inner(a.cols), whole = a.cols / kStep * kStep;
  for (int64_t row = 0; row < a.rows; ++row, to += stride) {
    for (int64_t k = 0; k < whole; k += kStep) {
      for (int v = 0; v < V; ++v) {
        for (int i = 0; i < W; ++i) to[k + v * W + i] = load(at<T>(a, row, k + i * V + v));
      }
    }
    std::fill(to + whole, to + stride, 0.0f);
    for (int64_t i = 0; whole + i < a.cols; ++i) to[whole + i % V * W + i / V] = load(at<T>(a, row, whole + i));
  }
}
// By chunks of rows: for each k, one number of each row of the chunk.
template <typename T>
void pack_columns(const Matrix& a, float* to) {
  for (int64_t chunk = 0; chunk < chunks(a.rows); ++chunk) {
    const int64_t begin = chunk_begin(a.rows, chunk), end = chunk_begin(a.rows, chunk + 1);
    for (int64_t k = 0; k < a.cols; ++k) {
      for (int64_t row = begin; row < end; ++row) *to++ = load(at<T>(a, row, k));
    }
  }
}

#ifdef DMOE_X86_LEVELS
// The same of pairs (k, k + 1), the first in the lower half.
inline uint32_t pair_at(const Matrix& a, int64_t row, int64_t k) {
  const auto bits = [&](int64_t column) -> uint32_t {
    return column < a.cols ? bits_of<uint16_t>(*at<BFloat16>(a, row, column)) : 0;
  };
  return bits(k) | bits(k + 1) << 16;
}
inline void pack_row_pairs(const Matrix& a, uint32_t* to) {
  const int64_t pairs = packed_pairs(a.cols);
  for (int64_t row = 0; row < a.rows; ++row, to += pairs) {
    if (a.col_stride == 1) {  // pairs already
      std::memcpy(to, at<BFloat16>(a, row, 0), a.cols * sizeof(BFloat16));
      std::memset(reinterpret_cast<char*>(to) + a.cols * sizeof(BFloat16), 0, 4 * pairs - a.cols * sizeof(BFloat16));
    } else {
      for (int64_t k = 0; k < pairs; ++k) to[k] = pair_at(a, row, 2 * k);
    }
  }
}
inline void pack_column_pairs(const Matrix& a, uint32_t* to) {
  for (int64_t chunk = 0; chunk < chunks(a.rows); ++chunk) {
    const int64_t begin = chunk_begin(a.rows, chunk), end = chunk_begin(a.rows, chunk + 1);
    for (int64_t k = 0; k < a.cols; k += 2) {
      for (int64_t row = begin; row < end; ++row) *to++ = pair_at(a, row, k);
    }
  }
}
#endif

// A product of `a`, which goes to `numbers` as it is read.
template <int W, typename T>
DMOE_INLINE void run_lanes(const Matrix& a, float* numbers, const Product<T>& p, bool columns_are_dense) {
  if (columns_are_dense) {
    pack_rows<W, T>(a, numbers);
    dot<W, T>(p);
  } else {
    pack_columns<T>(a, numbers);
    axpy<W, T>(p);
  }
}

#ifdef DMOE_X86_LEVELS
template <typename T>
__attribute__((target("arch=x86-64-v4"))) void run_avx512(const Matrix& a, float* to, const Product<T>& p, bool dot) {
  run_lanes<16, T>(a, to, p, dot);
}
template <typename T>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(const Matrix& a, float* to, const Product<T>& p, bool dot) {
  run_lanes<8, T>(a, to, p, dot);
}
#endif

inline void* scratch(size_t bytes) {
  static thread_local Scratch memory;
  return memory.get(bytes);
}

// With `by_row` the kernel is one for any number of rows.
template <typename T>
void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate, bool by_row = false) {
  const bool columns_are_dense = b.col_stride != 1;
  const int64_t w_stride = columns_are_dense ? b.col_stride : b.row_stride;
  void* packed = scratch(a.rows * packed_inner(a.cols) * sizeof(float));
  T* to = static_cast<T*>(out.data);
  const T* w = static_cast<const T*>(b.data);
#ifdef DMOE_X86_LEVELS
  if constexpr (std::is_same_v<T, BFloat16>) {
    // One or two rows wait for memory in any case, and streams of it are then what is fast.
    if (level() == Level::kAvx512Bf16 && (a.rows > 2 || by_row)) {
      auto* pairs = static_cast<uint32_t*>(packed);
      const PairProduct p{to, out.row_stride, pairs, w, w_stride, out.rows, a.cols, out.cols, accumulate};
      columns_are_dense ? pack_row_pairs(a, pairs) : pack_column_pairs(a, pairs);
      return columns_are_dense ? pair_dot(p) : pair_axpy(p);
    }
  }
#endif
  auto* numbers = static_cast<float*>(packed);
  const Product<T> p{to, out.row_stride, numbers, w, w_stride, out.rows, a.cols, out.cols, accumulate};
#ifdef DMOE_X86_LEVELS
  if (level() >= Level::kAvx512) return run_avx512<T>(a, numbers, p, columns_are_dense);
  if (level() == Level::kAvx2) return run_avx2<T>(a, numbers, p, columns_are_dense);
#endif
  run_lanes<4, T>(a, numbers, p, columns_are_dense);
}

// Few columns: the transposed product has few rows.
template <typename T>
void multiply_transposed(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  static thread_local Scratch memory;
  auto* thin = static_cast<T*>(memory.get(out.rows * out.cols * sizeof(T)));
  T* to = static_cast<T*>(out.data);
  const auto for_each = [&](const auto& fn) {
    for (int64_t row = 0; row < out.rows; ++row) {
      for (int64_t column = 0; column < out.cols; ++column) {
        fn(to[row * out.row_stride + column], thin[column * out.rows + row]);
      }
    }
  };
  if (accumulate) for_each([](const T& there, T& here) { here = there; });
  multiply<T>(row_major(thin, out.cols, out.rows, out.rows), transposed(b), transposed(a), accumulate);
  for_each([](T& there, const T& here) { there = here; });
}

// Sums of a vector or two, of columns that are contiguous: rows are made of those.
template <typename T>
void multiply_rearranged(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  static thread_local Scratch memory;
  T* rows = static_cast<T*>(memory.get(b.rows * b.cols * sizeof(T)));
  for (int64_t column = 0; column < b.cols; ++column) {
    for (int64_t k = 0; k < b.rows; ++k) rows[k * b.cols + column] = *at<T>(b, k, column);
  }
  multiply<T>(out, a, row_major(rows, b.rows, b.cols, b.cols), accumulate);
}

// <a, b> in eight sums, of contiguous numbers.
DMOE_SIMD double dot_of_doubles(const double* a, const double* b, int64_t inner) {
  constexpr int kLanes = 8;
  double sums[kLanes] = {};
  const int64_t whole = inner / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) sums[i] += a[k + i] * b[k + i];
  }
  for (int64_t k = whole; k < inner; ++k) sums[k - whole] += a[k] * b[k];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}
// sum += a @ w, row after row of w.
DMOE_SIMD void add_row_of_doubles(double* sum, const double* a, const double* w, int64_t w_stride, int64_t inner,
                                  int64_t columns) {
  for (int64_t k = 0; k < inner; ++k) {
    const double number = a[k];
    for (int64_t c = 0; c < columns; ++c) sum[c] += number * w[k * w_stride + c];
  }
}

// float64 row by row; what else is float64 here is the BLAS library's.
inline void multiply_doubles(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  static thread_local Scratch memory;
  auto* rows = static_cast<double*>(memory.get((a.rows * a.cols + b.cols) * sizeof(double)));
  double* sum = rows + a.rows * a.cols;
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t k = 0; k < a.cols; ++k) rows[row * a.cols + k] = *at<double>(a, row, k);
  }
  auto* to = static_cast<double*>(out.data);
  if (b.col_stride != 1) {  // a column stays in the innermost cache for all rows
    for (int64_t column = 0; column < b.cols; ++column) {
      for (int64_t row = 0; row < a.rows; ++row) {
        const double product = dot_of_doubles(rows + row * a.cols, at<double>(b, 0, column), a.cols);
        double& result = to[row * out.row_stride + column];
        result = accumulate ? result + product : product;
      }
    }
    return;
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    std::fill_n(sum, b.cols, 0.0);
    add_row_of_doubles(sum, rows + row * a.cols, at<double>(b, 0, 0), b.row_stride, a.cols, b.cols);
    double* result = to + row * out.row_stride;
    for (int64_t c = 0; c < b.cols; ++c) result[c] = accumulate ? result[c] + sum[c] : sum[c];
  }
}

}  // namespace few

void multiply_thin(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate, Thin thin) {
  const auto run = [&](auto number) {
    using T = decltype(number);
    if (thin == Thin::kColumns) return few::multiply_transposed<T>(out, a, b, accumulate);
    const bool rearrange = thin == Thin::kSums && b.col_stride != 1 && out.rows > few::kChunk;
    rearrange ? few::multiply_rearranged<T>(out, a, b, accumulate) : few::multiply<T>(out, a, b, accumulate);
  };
  switch (dtype) {
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(BFloat16{});
    default: return run(Half{});
  }
}

// As the C library does it, past what a loop of stores reads from memory first.
void fill_with_zeros(const Matrix& out, int64_t item) {
  const bool dense = out.row_stride == out.cols;
  auto* data = static_cast<char*>(out.data);
  const int64_t rows = dense ? 1 : out.rows, bytes = (dense ? out.rows : 1) * out.cols * item;
  for (int64_t row = 0; row < rows; ++row) std::memset(data + row * out.row_stride * item, 0, bytes);
}

void multiply_by_row(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate) {
  if (out.rows == 0 || out.cols == 0) return;
  const int64_t item = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  if (a.cols == 0) return accumulate ? void() : fill_with_zeros(out, item);
  // Rows at a time, which the weight, in the outer caches, is read once for.
  constexpr int64_t kRows = 64;
  const auto run = [&](auto number) {
    using T = decltype(number);
    static thread_local Scratch memory;
    Matrix right = b;
    if (b.row_stride != 1 && b.col_stride != 1) {
      T* dense = static_cast<T*>(memory.get(b.rows * b.cols * sizeof(T)));
      for (int64_t k = 0; k < b.rows; ++k) {
        for (int64_t column = 0; column < b.cols; ++column) dense[k * b.cols + column] = *at<T>(b, k, column);
      }
      right = row_major(dense, b.rows, b.cols, b.cols);
    }
    for (int64_t first = 0; first < out.rows; first += kRows) {
      const int64_t count = std::min(kRows, out.rows - first);
      const auto rows_from = [&](const Matrix& m) {
        return Matrix{static_cast<T*>(m.data) + first * m.row_stride, count, m.cols, m.row_stride, m.col_stride};
      };
      if constexpr (std::is_same_v<T, double>) {
        few::multiply_doubles(rows_from(out), rows_from(a), right, accumulate);
      } else {
        few::multiply<T>(rows_from(out), rows_from(a), right, accumulate, true);
      }
    }
  };
  with_floating(dtype, run);
}

}  // namespace dmoe
