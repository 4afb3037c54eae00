// The tiles of blocked_gemm_tiles.h for bfloat16 on processors that multiply pairs of it (AVX-512 BF16): an item is two
// numbers of a sum. Products are exact, sums in float32; numbers below 1.2e-38 count as zero there.
#pragma once

#include "blocked_gemm_pack.h"
#include "few_rows_bf16.h"

#ifdef DMOE_X86_LEVELS
namespace dmoe {
namespace blocked {

template <int R, bool kByRows>
DMOE_AVX512_BF16 void multiply_pairs(const Tile<uint32_t>& t) {
  constexpr int kRows = kTileRows<16>;
  constexpr int64_t kStride = kByRows ? kPiece : 1;
  const uint32_t* b = t.b;
  for (int64_t first = 0; first < t.inner; first += kPiece) {
    const uint32_t* a = t.a + first * kRows;
    const int64_t count = t.inner - first < kPiece ? t.inner - first : kPiece;
    __m512 sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; ++k, b += 32, a += kByRows ? 1 : kRows) {
      const __m512i left = few::load_pairs(b), right = few::load_pairs(b + 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[r * kStride]));
        sums[r][0] = few::add_pairs(sums[r][0], pair, left);
        sums[r][1] = few::add_pairs(sums[r][1], pair, right);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      if (r >= t.rows) break;
      float* to = t.c + r * t.c_stride;
      if (t.add || first > 0) {
        sums[r][0] = _mm512_add_ps(sums[r][0], _mm512_loadu_ps(to));
        sums[r][1] = _mm512_add_ps(sums[r][1], _mm512_loadu_ps(to + 16));
      }
      _mm512_storeu_ps(to, sums[r][0]), _mm512_storeu_ps(to + 16, sums[r][1]);
    }
  }
}

// The same factors as in blocked_gemm_pack.h, in pairs; `inner` and `begin` count numbers, and the last pair of an odd
// `inner` ends with zero. Of a panel all columns that are missing are zeros.
inline void pack_row_pairs(const Matrix& a, int64_t first, int64_t rows, int64_t begin, int64_t inner, uint32_t* to) {
  for (int64_t piece = 0; piece < inner; piece += 2 * kPiece, to += kTileRows<16> * kPiece) {
    const int64_t count = std::min(2 * kPiece, inner - piece);
    for (int64_t r = 0; r < rows; ++r) {
      uint32_t* row = to + r * kPiece;
      row[(count - 1) / 2] = 0;
      std::memcpy(row, at<BFloat16>(a, first + r, begin + piece), count * sizeof(BFloat16));
    }
  }
}

// Pairs of numbers that lie above each other: W of them.
template <int W>
DMOE_INLINE void pair_up(const BFloat16* upper, const BFloat16* lower, uint32_t* to) {
  few::Bits<W> pairs = few::load_halves<W>(upper);
  if (lower != nullptr) pairs |= few::load_halves<W>(lower) << 16;
  std::memcpy(to, &pairs, sizeof(pairs));
}
DMOE_INLINE uint32_t pair_of(const BFloat16* upper, const BFloat16* lower, int64_t i) {
  const uint32_t low = bits_of<uint16_t>(upper[i]);
  return lower == nullptr ? low : low | static_cast<uint32_t>(bits_of<uint16_t>(lower[i])) << 16;
}

DMOE_AVX512_BF16 inline void pack_column_pairs(const Matrix& a, int64_t first, int64_t rows, int64_t begin,
                                               int64_t inner, uint32_t* to) {
  constexpr int kRows = kTileRows<16>;
  for (int64_t k = 0; k < inner; k += 2, to += kRows) {
    const BFloat16* upper = at<BFloat16>(a, first, begin + k);
    const BFloat16* lower = k + 1 < inner ? upper + a.col_stride : nullptr;
    if (rows == kRows) {
      pair_up<8>(upper, lower, to), pair_up<4>(upper + 8, lower == nullptr ? nullptr : lower + 8, to + 8);
    } else {
      for (int64_t r = 0; r < rows; ++r) to[r] = pair_of(upper, lower, r);
    }
  }
}

DMOE_AVX512_BF16 inline void pack_panel_of_row_pairs(const Matrix& b, int64_t begin, int64_t inner, int64_t first,
                                                     int64_t columns, uint32_t* to) {
  for (int64_t k = 0; k < inner; k += 2, to += 32) {
    const BFloat16* upper = at<BFloat16>(b, begin + k, first);
    const BFloat16* lower = k + 1 < inner ? upper + b.row_stride : nullptr;
    __builtin_prefetch(upper + kAhead * b.row_stride, 0, 3), __builtin_prefetch(upper + (kAhead + 1) * b.row_stride, 0, 3);
    if (columns == 32) {
      pair_up<16>(upper, lower, to), pair_up<16>(upper + 16, lower == nullptr ? nullptr : lower + 16, to + 16);
    } else {
      for (int64_t n = 0; n < columns; ++n) to[n] = pair_of(upper, lower, n);
      std::fill(to + columns, to + 32, 0u);
    }
  }
}

DMOE_AVX512_BF16 inline void pack_panel_of_column_pairs(const Matrix& b, int64_t begin, int64_t inner, int64_t first,
                                                        int64_t columns, uint32_t* to) {
  for (int64_t k = 0; k < inner; k += 32) {
    const int64_t count = std::min<int64_t>(32, inner - k), pairs = (count + 1) / 2;
    for (int half = 0; half < 2; ++half) {
      const int64_t here = std::clamp<int64_t>(columns - half * 16, 0, 16);
      few::Lanes<16> square[16];
      if (here == 16 && count == 32) {
#pragma GCC unroll 16
        for (int n = 0; n < 16; ++n) {
          const BFloat16* from = at<BFloat16>(b, begin + k, first + half * 16 + n);
          __builtin_prefetch(from + 32 * b.col_stride, 0, 2);  // the panel to come
          std::memcpy(&square[n], from, sizeof(square[n]));
        }
      } else {
        std::memset(square, 0, sizeof(square));
        for (int n = 0; n < here; ++n) {
          std::memcpy(&square[n], at<BFloat16>(b, begin + k, first + half * 16 + n), count * sizeof(BFloat16));
        }
      }
      transpose<16>(square);
      for (int64_t i = 0; i < pairs; ++i) std::memcpy(to + (k / 2 + i) * 32 + half * 16, &square[i], sizeof(square[i]));
    }
  }
}

// As put_panel(), but whole rows of a panel are rounded by one instruction, numbers below 1.2e-38 to zero.
DMOE_AVX512_BF16 inline void put_panel_of_bfloat16(const float* from, int64_t rows, int64_t columns, BFloat16* to,
                                                   int64_t to_stride, bool add) {
  if (columns < 32 || add) return put_panel<16, BFloat16>(from, rows, columns, to, to_stride, add);
  for (int64_t r = 0; r < rows; ++r, from += 32, to += to_stride) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    std::memcpy(static_cast<void*>(to), &rounded, sizeof(rounded));
  }
}

}  // namespace blocked
}  // namespace dmoe
#endif
