// Blocked products: how a product is cut into tiles, and which kernels the processor runs.
#pragma GCC diagnostic ignored "-Wpsabi"                // vectors are passed between functions that are inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own intrinsics
#include "blocked_gemm.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "blocked_gemm_pack.h"
#include "blocked_gemm_pairs.h"
#include "cpu_level.h"

namespace dmoe {
namespace blocked {
namespace {

constexpr int64_t kMostInner = 2048;           // numbers of a sum between two readings of the result
constexpr int64_t kPackedBytes = 512 * 1024;   // of `a`, which with a panel of `b` stays in the second cache

// What differs between dtypes and processors. Sizes are in items, and an item is kNumbers numbers.
#define DMOE_BLOCKED_KIND(name, W, attribute)                                                                        \
  template <typename T>                                                                                              \
  struct name {                                                                                                      \
    using Item = float;                                                                                              \
    static constexpr int kLanes = W, kRows = kTileRows<W>, kNumbers = 1;                                             \
    attribute static void tile(const Tile<float>& t) { multiply_tile<W>(t); }                                        \
    attribute static void pack_a(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t inner, float* to) {  \
      a.col_stride == 1 ? pack_rows<W, T>(a, row, rows, k, inner, to) : pack_columns<W, T>(a, row, rows, k, inner, to); \
    }                                                                                                                \
    attribute static void pack_b(const Matrix& b, int64_t k, int64_t inner, int64_t column, int64_t columns,         \
                                 float* to) {                                                                        \
      b.col_stride == 1 ? pack_panel_of_rows<W, T>(b, k, inner, column, columns, to)                                 \
                        : pack_panel_of_columns<W, T>(b, k, inner, column, columns, to);                             \
    }                                                                                                                \
    attribute static void put(const float* from, int64_t rows, int64_t columns, T* to, int64_t stride, bool add) {   \
      put_panel<W, T>(from, rows, columns, to, stride, add);                                                         \
    }                                                                                                                \
  }
DMOE_BLOCKED_KIND(Portable, 4, );
#ifdef DMOE_X86_LEVELS
DMOE_BLOCKED_KIND(Avx2, 8, __attribute__((target("arch=x86-64-v3"))));
DMOE_BLOCKED_KIND(Avx512, 16, __attribute__((target("arch=x86-64-v4"))));

struct Pairs {
  using Item = uint32_t;
  static constexpr int kLanes = 16, kRows = kTileRows<16>, kNumbers = 2;
  static void tile(const Tile<uint32_t>& t) {
    with_rows<kRows>(t.rows, t.by_rows, [&](auto rows, auto by_rows) {
      multiply_pairs<decltype(rows)::value, decltype(by_rows)::value>(t);
    });
  }
  static void pack_a(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t inner, uint32_t* to) {
    a.col_stride == 1 ? pack_row_pairs(a, row, rows, k, inner, to) : pack_column_pairs(a, row, rows, k, inner, to);
  }
  static void pack_b(const Matrix& b, int64_t k, int64_t inner, int64_t column, int64_t columns, uint32_t* to) {
    b.col_stride == 1 ? pack_panel_of_row_pairs(b, k, inner, column, columns, to)
                      : pack_panel_of_column_pairs(b, k, inner, column, columns, to);
  }
  static void put(const float* from, int64_t rows, int64_t columns, BFloat16* to, int64_t stride, bool add) {
    put_panel_of_bfloat16(from, rows, columns, to, stride, add);
  }
};
#endif

thread_local Scratch packed_a, packed_b, sums_of_panels;

// Columns of the result one panel after the other, and for each panel all rows of a block. A result in float32 is
// written in its place; others, and columns that do not fill a panel, in float32 beside it.
template <typename Kind, typename T>
void run(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  using Item = typename Kind::Item;
  constexpr int64_t kColumns = 2 * Kind::kLanes, kRows = Kind::kRows;
  const int64_t rows = out.rows, columns = out.cols, most = std::min(a.cols, kMostInner);
  const int64_t items = (most + Kind::kNumbers - 1) / Kind::kNumbers;
  const bool by_rows = a.col_stride == 1;
  const int64_t of_tile = kRows * (by_rows ? round_up(items, kPiece) : items);  // packed items
  const int64_t fit = std::max<int64_t>(2, kPackedBytes / (items * kRows * static_cast<int64_t>(sizeof(Item))));
  const int64_t tiles = (rows + kRows - 1) / kRows, blocks = (tiles + fit - 1) / fit;
  const int64_t block_rows = (tiles + blocks - 1) / blocks * kRows;
  auto* a_items = static_cast<Item*>(packed_a.get((block_rows / kRows * of_tile) * sizeof(Item)));
  auto* b_items = static_cast<Item*>(packed_b.get(items * kColumns * sizeof(Item)));
  // With several parts of a sum every panel's sums wait for the last part; else a tile's are put while the first cache
  // has them.
  const bool in_parts = a.cols > most;
  const int64_t waiting = in_parts ? (columns + kColumns - 1) / kColumns * block_rows : kRows;
  auto* sums = static_cast<float*>(sums_of_panels.get(waiting * kColumns * sizeof(float)));

  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = std::min(block_rows, rows - first);
    for (int64_t begin = 0; begin < a.cols; begin += most) {
      const int64_t inner = std::min(most, a.cols - begin);
      const bool last = begin + inner == a.cols;
      for (int64_t row = 0; row < count; row += kRows) {
        Kind::pack_a(a, first + row, std::min(kRows, count - row), begin, inner, a_items + row / kRows * of_tile);
      }
      for (int64_t column = 0; column < columns; column += kColumns) {
        const int64_t width = std::min(kColumns, columns - column);
        Kind::pack_b(b, begin, inner, column, width, b_items);
        T* to = static_cast<T*>(out.data) + first * out.row_stride + column;
        const bool in_place = std::is_same_v<T, float> && width == kColumns;
        const bool add = begin > 0 || (in_place && accumulate);
        for (int64_t row = 0; row < count; row += kRows) {
          const int64_t height = std::min(kRows, count - row);
          T* to_row = to + row * out.row_stride;
          float* c = in_place   ? reinterpret_cast<float*>(to_row)
                     : in_parts ? sums + (column / kColumns * block_rows + row) * kColumns
                                : sums;
          Kind::tile({a_items + row / kRows * of_tile, b_items, (inner + Kind::kNumbers - 1) / Kind::kNumbers, c,
                      in_place ? out.row_stride : kColumns, static_cast<int>(height), by_rows, add});
          if (!in_place && last) Kind::put(c, height, width, to_row, out.row_stride, accumulate);
        }
      }
    }
  }
}

template <typename T>
void run_widened(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
#ifdef DMOE_X86_LEVELS
  if (few::level() >= few::Level::kAvx512) return run<Avx512<T>, T>(out, a, b, accumulate);
  if (few::level() == few::Level::kAvx2) return run<Avx2<T>, T>(out, a, b, accumulate);
#endif
  run<Portable<T>, T>(out, a, b, accumulate);
}

}  // namespace
}  // namespace blocked

bool blocked_takes(const Matrix& out, const Matrix& a, const Matrix& b) {
  const auto is_readable = [](const Matrix& m) { return m.row_stride == 1 || m.col_stride == 1; };
  return out.col_stride == 1 && is_readable(a) && is_readable(b) && a.cols > 0;
}

void multiply_blocked(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate) {
  switch (dtype) {
    case ScalarType::Float: return blocked::run_widened<float>(out, a, b, accumulate);
    case ScalarType::Half: return blocked::run_widened<Half>(out, a, b, accumulate);
    default:
#ifdef DMOE_X86_LEVELS
      if (few::level() == few::Level::kAvx512Bf16) return blocked::run<blocked::Pairs, BFloat16>(out, a, b, accumulate);
#endif
      return blocked::run_widened<BFloat16>(out, a, b, accumulate);
  }
}

}  // namespace dmoe
