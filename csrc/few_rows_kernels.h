// Products of few rows with one weight, for one instruction set: what few_rows.h chooses from.
//
// At few rows the work is the reading of the weight, so each element is read once from memory and used for all rows
// from registers or the innermost cache. `dot` is for weights whose columns are contiguous (lanes run along the sum),
// `axpy` for those whose rows are (lanes run along the output); the latter also makes weight gradients of few rows.
//
// In each of the two an element of the result is added up in an order that depends on the length of its sum alone: not
// on how many rows or columns are computed with it, nor on which tile it lies in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "few_rows_lanes.h"

namespace dmoe {
namespace few {

// One product: out (rows, columns) = a (rows, inner) @ w (inner, columns), or out += a @ w.
template <typename T>
struct Product {
  T* out;
  int64_t out_stride;
  const float* a;  // packed: see pack_rows(), pack_columns()
  const T* w;
  int64_t w_stride;  // between columns for dot, between rows for axpy
  int64_t rows, inner, columns;
  bool accumulate;
};

constexpr int kChunk = 4;               // rows that share one reading of the weight from the innermost cache
constexpr int64_t kLine = 64;           // bytes of a cache line
constexpr int64_t kAhead = 32;          // rows of the weight that axpy asks for in advance
constexpr int64_t kStream = 1024;       // columns whose sums stay in the innermost cache
constexpr int64_t kDotColumns = 8;      // that stay in the innermost cache for all chunks of rows
constexpr int64_t kManyRowsOfOne = 64;  // beyond them axpy writes row after row: a weight gradient, of short sums
constexpr int64_t kSumBlock = 256;      // numbers that axpy adds up one after the other before it adds that to the rest

constexpr int64_t round_up(int64_t number, int64_t to) { return (number + to - 1) / to * to; }

// Chunk number i of `rows` rows, cut into as many of at most kChunk as it takes, equally large.
DMOE_INLINE int64_t chunks(int64_t rows) { return (rows + kChunk - 1) / kChunk; }
DMOE_INLINE int64_t chunk_begin(int64_t rows, int64_t i) { return rows * i / chunks(rows); }

// -------------------------------------------------------------------------------------------------------------- dot

// Vectors of W numbers in a step. Of bfloat16 two: read as words, the numbers at odd places are a mask away from
// float32 and those at even places a shift, where W that lie together would have to be widened first.
template <typename T>
constexpr int kDotVectors = std::is_same_v<T, BFloat16> ? 2 : 1;

// Rows one after the other, `inner` rounded up with zeros to whole steps of any W; each step as its vectors are read.
inline int64_t packed_inner(int64_t inner) { return round_up(inner, 32); }

template <int W, typename T>
DMOE_INLINE void load_vectors(const T* from, Lanes<W>* to) {
  if constexpr (kDotVectors<T> == 1) {
    *to = load_lanes<W>(from);
  } else {
    Bits<W> words;
    std::memcpy(&words, from, sizeof(words));
    constexpr int kEven = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 1;
    to[kEven] = (Lanes<W>)(words << 16);
    to[1 - kEven] = (Lanes<W>)(words & 0xffff0000u);
  }
}

template <int W, typename T, int R, int N, bool kFetch>
DMOE_INLINE void dot_tile(const Product<T>& p, int64_t row, int64_t column) {
  constexpr int V = kDotVectors<T>, kStep = V * W;
  const int64_t a_stride = packed_inner(p.inner), whole = p.inner / kStep * kStep;
  const float* a = p.a + row * a_stride;
  const T* w = p.w + column * p.w_stride;
  constexpr int kSums = round_up(R * N, 4);
  Lanes<W> sums[kSums] = {};
  const auto step = [&](const float* x, const T* from, int64_t stride, auto fetch) __attribute__((always_inline)) {
    if (fetch) {  // the tile to come: streams of one column's length are too short; asking twice costs less than an if
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(from + (N + n) * stride, 0, 2);
    }
    // One row takes each column as it comes; several need all columns at hand.
    constexpr int kColumns = R == 1 ? 1 : N;
#pragma GCC unroll 8
    for (int first = 0; first < N; first += kColumns) {
      Lanes<W> weight[kColumns][V];
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) load_vectors<W>(from + (first + n) * stride, weight[n]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Lanes<W> numbers = load_lanes<W>(x + r * a_stride + v * W);
#pragma GCC unroll 8
          for (int n = 0; n < kColumns; ++n) sums[r * N + first + n] += numbers * weight[n][v];
        }
      }
    }
  };
  for (int64_t k = 0; k < whole; k += kStep) step(a + k, w + k, p.w_stride, std::bool_constant<kFetch>());
  if (whole < p.inner) {
    T rest[N][kStep] = {};
    for (int n = 0; n < N; ++n) std::copy_n(w + n * p.w_stride + whole, p.inner - whole, rest[n]);
    step(a + whole, rest[0], kStep, std::false_type());
  }
  float result[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += 4) {
    store_lanes<4>(result + i, sum_four<W>(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
  }
  for (int r = 0; r < R; ++r) {
    T* out = p.out + (row + r) * p.out_stride + column;
    for (int n = 0; n < N; ++n) store(out + n, p.accumulate ? load(out + n) + result[r * N + n] : result[r * N + n]);
  }
}

template <int W, typename T, int R, int N>
DMOE_INLINE void dot_tiles(const Product<T>& p, int64_t row, int64_t begin, int64_t end) {
  int64_t column = begin;
  if (row == 0) {
    for (; column + N <= end && column + 2 * N <= p.columns; column += N) dot_tile<W, T, R, N, true>(p, row, column);
  }
  for (; column + N <= end; column += N) dot_tile<W, T, R, N, false>(p, row, column);
  for (; column < end; ++column) dot_tile<W, T, R, 1, false>(p, row, column);
}

template <int W, typename T>
DMOE_INLINE void dot(const Product<T>& p) {
  for (int64_t begin = 0; begin < p.columns; begin += kDotColumns) {
    const int64_t end = std::min(p.columns, begin + kDotColumns);
    for (int64_t chunk = 0; chunk < chunks(p.rows); ++chunk) {
      const int64_t row = chunk_begin(p.rows, chunk);
      switch (chunk_begin(p.rows, chunk + 1) - row) {
        case 1: dot_tiles<W, T, 1, 8>(p, row, begin, end); break;
        case 2: dot_tiles<W, T, 2, 4>(p, row, begin, end); break;
        case 3: dot_tiles<W, T, 3, W == 16 ? 4 : 2>(p, row, begin, end); break;
        default: dot_tiles<W, T, 4, W == 16 ? 4 : 2>(p, row, begin, end);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- axpy

template <int W, typename T, int R, int N, bool kFetch>
DMOE_INLINE void axpy_tile(const Product<T>& p, const float* a, int64_t row, int64_t column) {
  const T* w = p.w + column;
  Lanes<W> total[R * N] = {};
  for (int64_t first = 0; first < p.inner; first += kSumBlock) {
    const int64_t last = std::min(p.inner, first + kSumBlock);
    Lanes<W> sums[R * N] = {};
    for (int64_t k = first; k < last; ++k) {
      Lanes<W> weight[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) weight[n] = load_lanes<W>(w + k * p.w_stride + n * W);
      if (kFetch && k + kAhead < p.inner) {
#pragma GCC unroll 8
        for (int n = 0; n < N * W; n += kLine / sizeof(T)) __builtin_prefetch(w + (k + kAhead) * p.w_stride + n, 0, 2);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float x = a[k * R + r];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[r * N + n] += x * weight[n];
      }
    }
    for (int i = 0; i < R * N; ++i) total[i] = first == 0 ? sums[i] : total[i] + sums[i];
  }
  for (int r = 0; r < R; ++r) {
    T* out = p.out + (row + r) * p.out_stride + column;
    for (int n = 0; n < N; ++n) {
      const Lanes<W> sum = total[r * N + n];
      store_lanes<W>(out + n * W, p.accumulate ? load_lanes<W>(out + n * W) + sum : sum);
    }
  }
}

// The same sums for one or two rows, which only wait for the weight: long pieces of several of its rows at a time, with
// the sums in the innermost cache, as memory is fastest at what follows each other.
template <int W, typename T, int R>
DMOE_INLINE void axpy_streams(const Product<T>& p, const float* a, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 8;
  alignas(64) float sums[R][kStream], total[R][kStream];
  const int64_t width = end - begin;
  for (int64_t first = 0; first < p.inner; first += kSumBlock) {
    const int64_t last = std::min(p.inner, first + kSumBlock);
    for (int r = 0; r < R; ++r) std::fill_n(sums[r], width, 0.0f);
    for (int64_t k = first; k < last; k += kRows) {
      const int count = static_cast<int>(std::min(kRows, last - k));
      const T* w = p.w + k * p.w_stride + begin;
      const float* x = a + k * R;
      const bool fetch = k + 2 * kRows <= p.inner;
      const auto add = [&](const int rows) __attribute__((always_inline)) {
        for (int64_t n = 0; n < width; n += W) {
          if (fetch && n * sizeof(T) % kLine == 0) {
#pragma GCC unroll 8
            for (int j = 0; j < kRows; ++j) __builtin_prefetch(w + (kRows + j) * p.w_stride + n, 0, 2);
          }
          Lanes<W> sum[R];
          for (int r = 0; r < R; ++r) sum[r] = load_lanes<W>(sums[r] + n);
#pragma GCC unroll 8
          for (int j = 0; j < rows; ++j) {
            const Lanes<W> weight = load_lanes<W>(w + j * p.w_stride + n);
            for (int r = 0; r < R; ++r) sum[r] += x[j * R + r] * weight;
          }
          for (int r = 0; r < R; ++r) store_lanes<W>(sums[r] + n, sum[r]);
        }
      };
      count == kRows ? add(kRows) : add(count);
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t n = 0; n < width; n += W) {
        const Lanes<W> sum = load_lanes<W>(sums[r] + n);
        store_lanes<W>(total[r] + n, first == 0 ? sum : load_lanes<W>(total[r] + n) + sum);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    T* out = p.out + (row + r) * p.out_stride + begin;
    for (int64_t n = 0; n < width; n += W) {
      const Lanes<W> sum = load_lanes<W>(total[r] + n);
      store_lanes<W>(out + n, p.accumulate ? load_lanes<W>(out + n) + sum : sum);
    }
  }
}

// Columns [begin, end), fewer than W. The sum is the outermost loop, or the compiler adds rounded products in some of
// these functions, and fuses in others.
template <int W, typename T, int R>
DMOE_INLINE void axpy_rest(const Product<T>& p, const float* a, int64_t row, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  float total[R][W] = {};
  for (int64_t first = 0; first < p.inner && count > 0; first += kSumBlock) {
    const int64_t last = std::min(p.inner, first + kSumBlock);
    float sums[R][W] = {};
    for (int64_t k = first; k < last; ++k) {
      const T* w = p.w + k * p.w_stride + begin;
      for (int64_t c = 0; c < count; ++c) {
        for (int r = 0; r < R; ++r) sums[r][c] += a[k * R + r] * load(w + c);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int64_t c = 0; c < count; ++c) total[r][c] = first == 0 ? sums[r][c] : total[r][c] + sums[r][c];
    }
  }
  for (int r = 0; r < R; ++r) {
    T* out = p.out + (row + r) * p.out_stride + begin;
    for (int64_t c = 0; c < count; ++c) store(out + c, p.accumulate ? load(out + c) + total[r][c] : total[r][c]);
  }
}

template <int W, typename T, int R, int N>
DMOE_INLINE void axpy_tiles(const Product<T>& p, int64_t row, int64_t begin, int64_t end) {
  const float* a = p.a + row * p.inner;
  int64_t column = begin;
  if (row == 0) {
    for (; column + N * W <= end; column += N * W) axpy_tile<W, T, R, N, true>(p, a, row, column);
  } else {
    for (; column + N * W <= end; column += N * W) axpy_tile<W, T, R, N, false>(p, a, row, column);
  }
  for (; column + W <= end; column += W) axpy_tile<W, T, R, 1, false>(p, a, row, column);
  axpy_rest<W, T, R>(p, a, row, column, end);
}

template <int W, typename T>
DMOE_INLINE void axpy(const Product<T>& p) {
  if (p.rows <= 2 && p.inner > 8) {
    const int64_t whole = p.columns / W * W;
    for (int64_t begin = 0; begin < whole; begin += kStream) {
      const int64_t end = std::min(whole, begin + kStream);
      p.rows == 1 ? axpy_streams<W, T, 1>(p, p.a, 0, begin, end) : axpy_streams<W, T, 2>(p, p.a, 0, begin, end);
    }
    p.rows == 1 ? axpy_rest<W, T, 1>(p, p.a, 0, whole, p.columns) : axpy_rest<W, T, 2>(p, p.a, 0, whole, p.columns);
    return;
  }
  // Few rows: the weight is read once, tile by tile. Many rows (of a weight gradient, whose `inner` is small): they are
  // written one after the other.
  const int64_t width = p.rows <= kManyRowsOfOne ? 8 * W : p.columns;
  for (int64_t begin = 0; begin < p.columns; begin += width) {
    const int64_t end = std::min(p.columns, begin + width);
    for (int64_t chunk = 0; chunk < chunks(p.rows); ++chunk) {
      const int64_t row = chunk_begin(p.rows, chunk);
      switch (chunk_begin(p.rows, chunk + 1) - row) {
        case 1: axpy_tiles<W, T, 1, 8>(p, row, begin, end); break;
        case 2: axpy_tiles<W, T, 2, 4>(p, row, begin, end); break;
        case 3: axpy_tiles<W, T, 3, W == 16 ? 4 : 2>(p, row, begin, end); break;
        default: axpy_tiles<W, T, 4, W == 16 ? 4 : 2>(p, row, begin, end);
      }
    }
  }
}

}  // namespace few
}  // namespace dmoe
