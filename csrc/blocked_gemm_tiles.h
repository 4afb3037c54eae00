// The innermost part of a blocked product, for one instruction set: a tile of the result in registers.
//
// A tile is R rows of two vectors. For each number of its sums it takes two vectors of `b` and one number of each row of
// `a`, which an instruction spreads over a vector: 24 multiply-adds for 14 loads with AVX-512, whose 32 registers hold
// 24 sums. `b` lies as it is read, so that it streams; `a` lies row by row in pieces of kPiece numbers, as it comes, or
// number by number where it comes transposed. Both strides are constants, which leaves one register for each pointer.
//
// An element of the result is added up in pieces of kPiece items, one after the other: it depends on its row, its column
// and the length of the sum alone, and a long sum rounds no worse than a short one in each of its pieces.
#pragma once

#include <cstdint>
#include <type_traits>

#include "few_rows_lanes.h"

namespace dmoe {
namespace blocked {

constexpr int64_t kPiece = 256;  // items of a row of `a` that lie together; 12 such rows are a third of a small L1

// Rows of a tile, as many as registers hold: 32 of them with AVX-512 and on ARM, else 16.
#ifdef __aarch64__
constexpr int kRowsOfFour = 12;
#else
constexpr int kRowsOfFour = 6;
#endif
template <int W>
constexpr int kTileRows = W == 16 ? 12 : W == 8 ? 6 : kRowsOfFour;

// One tile: c (rows, 2 W) = a @ b, or c += a @ b. An item is a number, or a pair of them that one instruction adds up.
template <typename Item>
struct Tile {
  const Item* a;  // (pieces, kTileRows, kPiece) where by_rows, else (inner, kTileRows)
  const Item* b;  // (inner, 2 W)
  int64_t inner;  // items
  float* c;
  int64_t c_stride;
  int rows;  // at most kTileRows
  bool by_rows, add;
};

template <int W, int R, bool kByRows>
DMOE_INLINE void multiply_rows_of(const Tile<float>& t) {
  using few::Lanes;
  constexpr int64_t kRows = kTileRows<W>, kStride = kByRows ? kPiece : 1, kStep = kByRows ? 1 : kRows;
  const float* b = t.b;
  for (int64_t first = 0; first < t.inner; first += kPiece) {
    const float* a = t.a + first * kRows;
    const int64_t count = t.inner - first < kPiece ? t.inner - first : kPiece;
    Lanes<W> sums[R][2] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, a += kStep, b += 2 * W) {
      const Lanes<W> left = few::load_lanes<W>(b), right = few::load_lanes<W>(b + W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const float number = a[r * kStride];
        sums[r][0] += number * left;
        sums[r][1] += number * right;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if (r >= t.rows) break;
      float* to = t.c + r * t.c_stride;
      if (t.add || first > 0) sums[r][0] += few::load_lanes<W>(to), sums[r][1] += few::load_lanes<W>(to + W);
      few::store_lanes<W>(to, sums[r][0]), few::store_lanes<W>(to + W, sums[r][1]);
    }
  }
}

// fn(R, by rows), both known when compiling, for a tile of so many rows: R is the next that there is code for.
template <int kMost, typename Function>
DMOE_INLINE void with_rows(int rows, bool by_rows, const Function& fn) {
  const auto run = [&](auto count) __attribute__((always_inline)) {
    by_rows ? fn(count, std::true_type()) : fn(count, std::false_type());
  };
  if (rows <= 2) return run(std::integral_constant<int, 2>());
  if (rows <= 4) return run(std::integral_constant<int, 4>());
  if constexpr (kMost > 6) {
    if (rows <= 6) return run(std::integral_constant<int, 6>());
    if (rows <= 8) return run(std::integral_constant<int, 8>());
    if (rows <= 10) return run(std::integral_constant<int, 10>());
  }
  run(std::integral_constant<int, kMost>());
}

template <int W>
DMOE_INLINE void multiply_tile(const Tile<float>& t) {
  with_rows<kTileRows<W>>(t.rows, t.by_rows, [&](auto rows, auto by_rows) __attribute__((always_inline)) {
    multiply_rows_of<W, decltype(rows)::value, decltype(by_rows)::value>(t);
  });
}

}  // namespace blocked
}  // namespace dmoe
