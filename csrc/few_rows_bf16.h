// The kernels of few_rows_kernels.h for bfloat16 on processors that multiply pairs of it (AVX-512 BF16): products are
// exact, sums in float32, half the instructions. Numbers below 1.2e-38 count as zero there.
#pragma once

#include "few_rows_kernels.h"

#ifdef DMOE_X86_LEVELS
#include <immintrin.h>

#define DMOE_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define DMOE_AVX512_BF16_INLINE DMOE_AVX512_BF16 __attribute__((always_inline)) inline

namespace dmoe {
namespace few {

struct PairProduct {
  BFloat16* out;
  int64_t out_stride;
  const uint32_t* a;  // pairs, packed: see pack_row_pairs(), pack_column_pairs()
  const BFloat16* w;
  int64_t w_stride;
  int64_t rows, inner, columns;
  bool accumulate;
};

// Pairs of a row, rounded up to whole vectors.
inline int64_t packed_pairs(int64_t inner) { return packed_inner(inner) / 2; }

DMOE_AVX512_BF16_INLINE __m512i load_pairs(const void* p) { return _mm512_loadu_si512(p); }
DMOE_AVX512_BF16_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
DMOE_AVX512_BF16_INLINE __m512 as_numbers(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
DMOE_AVX512_BF16_INLINE __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// -------------------------------------------------------------------------------------------------------------- dot

// 32 numbers of the sums, or as many as `mask` says.
template <int R, int N, bool kFetch, bool kMasked>
DMOE_AVX512_BF16_INLINE void pair_dot_step(const PairProduct& p, const uint32_t* a, const BFloat16* w, __mmask32 mask,
                                           __m512* sums) {
  const int64_t a_stride = packed_pairs(p.inner);
  __m512i weight[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const BFloat16* from = w + n * p.w_stride;
    weight[n] = kMasked ? _mm512_maskz_loadu_epi16(mask, from) : load_pairs(from);
    if (kFetch) __builtin_prefetch(from + N * p.w_stride, 0, 2);  // the tile to come
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512i x = load_pairs(a + r * a_stride);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r * N + n] = add_pairs(sums[r * N + n], x, weight[n]);
  }
}

template <int R, int N, bool kFetch>
DMOE_AVX512_BF16_INLINE void pair_dot_tile(const PairProduct& p, int64_t row, int64_t column) {
  const int64_t whole = p.inner / 32 * 32;
  const uint32_t* a = p.a + row * packed_pairs(p.inner);
  const BFloat16* w = p.w + column * p.w_stride;
  constexpr int kSums = round_up(R * N, 4);
  __m512 sums[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < whole; k += 32) pair_dot_step<R, N, kFetch, false>(p, a + k / 2, w + k, 0, sums);
  if (whole < p.inner) {
    pair_dot_step<R, N, false, true>(p, a + whole / 2, w + whole, first_of_32(p.inner - whole), sums);
  }
  float result[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += 4) {
    store_lanes<4>(result + i, sum_four<16>(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
  }
  for (int r = 0; r < R; ++r) {
    BFloat16* out = p.out + (row + r) * p.out_stride + column;
    for (int n = 0; n < N; ++n) store(out + n, p.accumulate ? load(out + n) + result[r * N + n] : result[r * N + n]);
  }
}

template <int R, int N>
DMOE_AVX512_BF16_INLINE void pair_dot_tiles(const PairProduct& p, int64_t row, int64_t begin, int64_t end) {
  int64_t column = begin;
  if (row == 0) {
    for (; column + N <= end && column + 2 * N <= p.columns; column += N) pair_dot_tile<R, N, true>(p, row, column);
  }
  for (; column + N <= end; column += N) pair_dot_tile<R, N, false>(p, row, column);
  for (; column < end; ++column) pair_dot_tile<R, 1, false>(p, row, column);
}

DMOE_AVX512_BF16 inline void pair_dot(const PairProduct& p) {
  for (int64_t begin = 0; begin < p.columns; begin += kDotColumns) {
    const int64_t end = std::min(p.columns, begin + kDotColumns);
    for (int64_t chunk = 0; chunk < chunks(p.rows); ++chunk) {
      const int64_t row = chunk_begin(p.rows, chunk);
      switch (chunk_begin(p.rows, chunk + 1) - row) {
        case 1: pair_dot_tiles<1, 8>(p, row, begin, end); break;
        case 2: pair_dot_tiles<2, 4>(p, row, begin, end); break;
        case 3: pair_dot_tiles<3, 4>(p, row, begin, end); break;
        default: pair_dot_tiles<4, 4>(p, row, begin, end);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- axpy

// Two rows of the weight, or the last one alone; of N times 32 columns, or of as many of 32 as `mask` says.
template <int R, int N, bool kFetch, bool kMasked, bool kAlone>
DMOE_AVX512_BF16_INLINE void pair_axpy_step(const PairProduct& p, const uint32_t* a, const BFloat16* w, __mmask32 mask,
                                            __m512* sums) {
  __m512i weight[N * 2];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const BFloat16 *first = w + n * 32, *second = first + p.w_stride;
    __m512i one = kMasked ? _mm512_maskz_loadu_epi16(mask, first) : load_pairs(first), other = _mm512_setzero_si512();
    if (!kAlone) other = kMasked ? _mm512_maskz_loadu_epi16(mask, second) : load_pairs(second);
    weight[2 * n] = _mm512_unpacklo_epi16(one, other);
    weight[2 * n + 1] = _mm512_unpackhi_epi16(one, other);
    if (kFetch) {
      __builtin_prefetch(first + kAhead * p.w_stride, 0, 2);
      __builtin_prefetch(second + kAhead * p.w_stride, 0, 2);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 8
    for (int n = 0; n < N * 2; ++n) sums[r * N * 2 + n] = add_pairs(sums[r * N * 2 + n], x, weight[n]);
  }
}

// N times 32 columns from `column` on; of 32, where N is 1, only the first `last`.
template <int R, int N, bool kFetch, bool kMasked>
DMOE_AVX512_BF16_INLINE void pair_axpy_tile(const PairProduct& p, const uint32_t* a, int64_t row, int64_t column,
                                            int64_t last) {
  constexpr int kSums = R * N * 2;
  const BFloat16* w = p.w + column;
  const __mmask32 mask = first_of_32(last);
  const int64_t whole = p.inner / 2, step = 2 * p.w_stride;
  __m512 total[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t first = 0; first < p.inner; first += kSumBlock) {
    const int64_t begin = first / 2, end = std::min(whole, begin + kSumBlock / 2);
    const int64_t fetched = kFetch ? std::clamp((p.inner - kAhead) / 2, begin, end) : begin;
    __m512 sums[kSums];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_ps();
    int64_t k = begin;
    for (; k < fetched; ++k) pair_axpy_step<R, N, true, kMasked, false>(p, a + k * R, w + k * step, mask, sums);
    for (; k < end; ++k) pair_axpy_step<R, N, false, kMasked, false>(p, a + k * R, w + k * step, mask, sums);
    if (2 * k < p.inner && first + kSumBlock > 2 * k) {
      pair_axpy_step<R, N, false, kMasked, true>(p, a + k * R, w + k * step, mask, sums);
    }
    if (p.inner <= kSumBlock) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) total[i] = sums[i];
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) total[i] = _mm512_add_ps(total[i], sums[i]);
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const __m512 one = total[(r * N + n) * 2], other = total[(r * N + n) * 2 + 1];
      __m512 first = _mm512_permutex2var_ps(one, low, other), second = _mm512_permutex2var_ps(one, high, other);
      BFloat16* out = p.out + (row + r) * p.out_stride + column + n * 32;
      if (p.accumulate) {
        const __m512i there = kMasked ? _mm512_maskz_loadu_epi16(mask, out) : load_pairs(out);
        first = _mm512_add_ps(first, as_numbers(_mm512_castsi512_si256(there)));
        second = _mm512_add_ps(second, as_numbers(_mm512_extracti64x4_epi64(there, 1)));
      }
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      kMasked ? _mm512_mask_storeu_epi16(out, mask, rounded) : _mm512_storeu_si512(out, rounded);
    }
  }
}

template <int R, int N>
DMOE_AVX512_BF16_INLINE void pair_axpy_tiles(const PairProduct& p, int64_t row, int64_t begin, int64_t end) {
  const uint32_t* a = p.a + row * ((p.inner + 1) / 2);
  int64_t column = begin;
  if (row == 0) {
    for (; column + N * 32 <= end; column += N * 32) pair_axpy_tile<R, N, true, false>(p, a, row, column, 32);
  } else {
    for (; column + N * 32 <= end; column += N * 32) pair_axpy_tile<R, N, false, false>(p, a, row, column, 32);
  }
  for (; column + 32 <= end; column += 32) pair_axpy_tile<R, 1, false, false>(p, a, row, column, 32);
  if (column < end) pair_axpy_tile<R, 1, false, true>(p, a, row, column, end - column);
}

DMOE_AVX512_BF16 inline void pair_axpy(const PairProduct& p) {
  const int64_t width = p.rows <= kManyRowsOfOne ? 128 : p.columns;
  for (int64_t begin = 0; begin < p.columns; begin += width) {
    const int64_t end = std::min(p.columns, begin + width);
    for (int64_t chunk = 0; chunk < chunks(p.rows); ++chunk) {
      const int64_t row = chunk_begin(p.rows, chunk);
      switch (chunk_begin(p.rows, chunk + 1) - row) {
        case 1: pair_axpy_tiles<1, 4>(p, row, begin, end); break;
        case 2: pair_axpy_tiles<2, 2>(p, row, begin, end); break;
        case 3: pair_axpy_tiles<3, 2>(p, row, begin, end); break;
        default: pair_axpy_tiles<4, 2>(p, row, begin, end);
      }
    }
  }
}

}  // namespace few
}  // namespace dmoe
#endif
