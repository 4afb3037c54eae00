// Factors of a blocked product in the order in which its tiles read them, as float32 whatever their dtype.
//
// A factor may come with contiguous rows or with contiguous columns. What has to be turned over is `b` with contiguous
// columns, a weight as it is kept: in squares of registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "blocked_gemm_tiles.h"
#include "few_rows_kernels.h"
#include "gemm.h"

namespace dmoe {
namespace blocked {

constexpr int64_t kAhead = 48;  // rows of `b` that are asked for in advance: each is in another page than the one before

using few::round_up;

// The first `count` of W numbers, and zeros.
template <int W, typename T>
DMOE_INLINE few::Lanes<W> load_some(const T* from, int64_t count) {
  T numbers[W] = {};
  std::memcpy(static_cast<void*>(numbers), from, count * sizeof(T));
  return few::load_lanes<W>(numbers);
}
template <int W, typename T>
DMOE_INLINE few::Lanes<W> load_up_to(const T* from, int64_t count) {
  return count >= W ? few::load_lanes<W>(from) : load_some<W>(from, count);
}

// What becomes of row i and row i + d of a square in the step of distance d.
template <int W, int D, int... I>
DMOE_INLINE void exchange(few::Lanes<W>& low, few::Lanes<W>& high, std::integer_sequence<int, I...>) {
  const few::Lanes<W> a = low, b = high;
#if defined(__clang__)
  low = __builtin_shufflevector(a, b, ((I & D) ? W + I - D : I)...);
  high = __builtin_shufflevector(a, b, ((I & D) ? W + I : I + D)...);
#else
  low = __builtin_shuffle(a, b, few::Bits<W>{((I & D) ? W + I - D : I)...});
  high = __builtin_shuffle(a, b, few::Bits<W>{((I & D) ? W + I : I + D)...});
#endif
}
template <int W, int D = 1>
DMOE_INLINE void transpose(few::Lanes<W>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & D) == 0) exchange<W, D>(rows[i], rows[i + D], std::make_integer_sequence<int, W>());
  }
  if constexpr (2 * D < W) transpose<W, 2 * D>(rows);
}

// Rows [first, first + rows) of `a`, numbers [begin, begin + inner): a tile of them.
template <int W, typename T>
DMOE_INLINE void pack_rows(const Matrix& a, int64_t first, int64_t rows, int64_t begin, int64_t inner, float* to) {
  for (int64_t piece = 0; piece < inner; piece += kPiece, to += kTileRows<W> * kPiece) {
    const int64_t count = std::min(kPiece, inner - piece), whole = count / W * W;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = at<T>(a, first + r, begin + piece);
      float* row = to + r * kPiece;
      for (int64_t k = 0; k < whole; k += W) few::store_lanes<W>(row + k, few::load_lanes<W>(from + k));
      for (int64_t k = whole; k < count; ++k) row[k] = load(from + k);
    }
  }
}
template <int W, typename T>
DMOE_INLINE void pack_columns(const Matrix& a, int64_t first, int64_t rows, int64_t begin, int64_t inner, float* to) {
  constexpr int kRows = kTileRows<W>;
  for (int64_t k = 0; k < inner; ++k, to += kRows) {
    const T* from = at<T>(a, first, begin + k);
    if (rows == kRows) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) to[r] = load(from + r);
    } else {
      for (int64_t r = 0; r < rows; ++r) to[r] = load(from + r);
    }
  }
}

// Columns [first, first + columns) of `b`, at most 2 W: a panel of them, with zeros behind.
template <int W, typename T>
DMOE_INLINE void pack_panel_of_rows(const Matrix& b, int64_t begin, int64_t inner, int64_t first, int64_t columns,
                                    float* to) {
  for (int64_t k = 0; k < inner; ++k, to += 2 * W) {
    const T* from = at<T>(b, begin + k, first);
    for (int64_t n = 0; n < 2 * W; n += 64 / sizeof(T)) __builtin_prefetch(from + kAhead * b.row_stride + n, 0, 3);
    if (columns == 2 * W) {
      few::store_lanes<W>(to, few::load_lanes<W>(from)), few::store_lanes<W>(to + W, few::load_lanes<W>(from + W));
    } else {
      few::store_lanes<W>(to, load_up_to<W>(from, columns));
      few::store_lanes<W>(to + W, columns > W ? load_some<W>(from + W, columns - W) : few::Lanes<W>{});
    }
  }
}
template <int W, typename T>
DMOE_INLINE void pack_panel_of_columns(const Matrix& b, int64_t begin, int64_t inner, int64_t first, int64_t columns,
                                       float* to) {
  for (int64_t k = 0; k < inner; k += W) {
    const int64_t count = std::min<int64_t>(W, inner - k);
    for (int half = 0; half < 2; ++half) {
      const int64_t here = std::clamp<int64_t>(columns - half * W, 0, W);
      few::Lanes<W> square[W];
      if (here == W && count == W) {
#pragma GCC unroll 16
        for (int n = 0; n < W; ++n) {
          const T* from = at<T>(b, begin + k, first + half * W + n);
          __builtin_prefetch(from + 2 * W * b.col_stride, 0, 2);  // the panel to come
          square[n] = few::load_lanes<W>(from);
        }
      } else {
        for (int n = 0; n < W; ++n) {
          square[n] = n < here ? load_up_to<W>(at<T>(b, begin + k, first + half * W + n), count) : few::Lanes<W>{};
        }
      }
      transpose<W>(square);
      if (count == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) few::store_lanes<W>(to + (k + i) * 2 * W + half * W, square[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) few::store_lanes<W>(to + (k + i) * 2 * W + half * W, square[i]);
      }
    }
  }
}

// to = from, or to += from, of a panel's `columns` columns.
template <int W, typename T>
DMOE_INLINE void put_panel(const float* from, int64_t rows, int64_t columns, T* to, int64_t to_stride, bool add) {
  for (int64_t r = 0; r < rows; ++r, from += 2 * W, to += to_stride) {
    int64_t c = 0;
    for (; c + W <= columns; c += W) {
      const few::Lanes<W> sum = few::load_lanes<W>(from + c);
      few::store_lanes<W>(to + c, add ? few::load_lanes<W>(to + c) + sum : sum);
    }
    for (; c < columns; ++c) store(to + c, add ? load(to + c) + from[c] : from[c]);
  }
}

}  // namespace blocked
}  // namespace dmoe
