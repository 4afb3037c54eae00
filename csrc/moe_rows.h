// Row kernels of moe_mlp: gather, the activation forward and backward, and the weighted sum of a token's rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "simd.h"

namespace dmoe {

// out[c] = in[c] * scale
template <typename T>
DMOE_SIMD void scale_row(const T* in, Accumulate<T> scale, T* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(out + c, load(in + c) * scale);
}

// out[c] = in[c] * scale[c]
template <typename T>
DMOE_SIMD void multiply_row(const T* in, const Accumulate<T>* scale, T* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(out + c, load(in + c) * scale[c]);
}

// row[c] += addend[c]
template <typename T>
DMOE_SIMD void add_row(T* row, const T* addend, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(row + c, load(row + c) + load(addend + c));
}

// sum[c] += weight * row[c]
template <typename T>
DMOE_SIMD void accumulate_row(Accumulate<T>* sum, Accumulate<T> weight, const T* row, int64_t width) {
  for (int64_t c = 0; c < width; ++c) sum[c] += weight * load(row + c);
}

// The same for four rows, in order, with one read and one write of the sum.
template <typename T>
DMOE_SIMD void accumulate_four(Accumulate<T>* sum, const Accumulate<T> weight[4], const T* const row[4], int64_t width) {
  const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
  const Accumulate<T> w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) {
    sum[c] = sum[c] + w0 * load(r0 + c) + w1 * load(r1 + c) + w2 * load(r2 + c) + w3 * load(r3 + c);
  }
}

template <typename T>
DMOE_SIMD void store_row(const Accumulate<T>* sum, T* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(out + c, sum[c]);
}

// Sum of values[0 .. width), halved again and again: vectorised, accurate, and the same bits on every instruction set.
// Overwrites them.
template <typename A>
DMOE_SIMD A fold(A* values, int64_t width) {
  if (width == 0) return A(0);
  while (width > 1) {
    const int64_t half = (width + 1) / 2;
#pragma GCC ivdep
    for (int64_t c = 0; c < width - half; ++c) values[c] += values[c + half];
    width = half;
  }
  return values[0];
}

// products[c] = a[c] * b[c]
template <typename T>
DMOE_SIMD void multiply_rows(const T* a, const T* b, Accumulate<T>* products, int64_t width) {
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) products[c] = load(a + c) * load(b + c);
}

// <a, b>, with `room` for width numbers.
template <typename T>
Accumulate<T> dot(const T* a, const T* b, Accumulate<T>* room, int64_t width) {
  multiply_rows<T>(a, b, room, width);
  return fold(room, width);
}

// Columns that lie a, b, a, b ... and those of a and of b, apart. As integers: GCC vectorises these only.
template <typename Bits>
DMOE_SIMD void split_bits(const Bits* both, Bits* a, Bits* b, int64_t width) {
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) {
    a[c] = both[2 * c];
    b[c] = both[2 * c + 1];
  }
}
template <typename Bits>
DMOE_SIMD void interleave_bits(const Bits* a, const Bits* b, Bits* both, int64_t width) {
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) {
    both[2 * c] = a[c];
    both[2 * c + 1] = b[c];
  }
}
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
template <typename T>
void split_row(const T* both, T* a, T* b, int64_t width) {
  using Bits = BitsOf<T>;
  split_bits(reinterpret_cast<const Bits*>(both), reinterpret_cast<Bits*>(a), reinterpret_cast<Bits*>(b), width);
}
template <typename T>
void interleave_row(const T* a, const T* b, T* both, int64_t width) {
  using Bits = BitsOf<T>;
  interleave_bits(reinterpret_cast<const Bits*>(a), reinterpret_cast<const Bits*>(b), reinterpret_cast<Bits*>(both),
                  width);
}

// hidden = act(gate) * up * scale * mask; `up` and `mask` may be null.
template <typename T, typename Activation>
DMOE_SIMD void activate_row(const Activation act, const T* gate, const T* up, Accumulate<T> scale,
                            const Accumulate<T>* mask, T* hidden, int64_t width) {
  if (up != nullptr) {
    for (int64_t c = 0; c < width; ++c) {
      store(hidden + c, act.value(load(gate + c)) * act.up_value(load(up + c)) * scale);
    }
  } else {
    for (int64_t c = 0; c < width; ++c) store(hidden + c, act.value(load(gate + c)) * scale);
  }
  if (mask != nullptr) {
    for (int64_t c = 0; c < width; ++c) store(hidden + c, load(hidden + c) * mask[c]);
  }
}

// Given the gradient g of the (masked, unscaled) hidden row: writes the gradient of gate and up for scale * g, the hidden
// row times scale, and the terms of <hidden, g>, the gradient of scale. `hidden` may be `g`'s own memory: an element is
// read before it is written. One plain loop with everything known at compile time, or GCC does not vectorise it.
template <typename T, typename Activation, bool kGated, bool kMasked>
DMOE_SIMD void backward_terms(const Activation act, const T* gate, const T* up, const T* g, Accumulate<T> scale,
                              const Accumulate<T>* mask, T* grad_gate, T* grad_up, T* hidden, Accumulate<T>* terms,
                              int64_t width) {
  using A = Accumulate<T>;
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) {
    A grad = load(g + c), value, slope, keep = scale;
    if constexpr (kMasked) grad *= mask[c], keep *= mask[c];
    act.both(load(gate + c), value, slope);
    const A scaled = scale * grad;
    if constexpr (kGated) {
      A factor, up_slope;
      act.up_both(load(up + c), factor, up_slope);
      store(grad_up + c, scaled * value * up_slope);
      slope *= factor;
      value *= factor;
    }
    terms[c] = value * grad;
    store(grad_gate + c, scaled * slope);
    store(hidden + c, keep * value);
  }
}

// The same for a row whose options are known at run time only; returns <hidden, g>. `room` holds width numbers.
template <typename T, typename Activation>
Accumulate<T> activate_row_backward(const Activation& act, const T* gate, const T* up, const T* g, Accumulate<T> scale,
                                    const Accumulate<T>* mask, T* grad_gate, T* grad_up, T* hidden,
                                    Accumulate<T>* room, int64_t width) {
  const auto run = [&](auto kernel) { kernel(act, gate, up, g, scale, mask, grad_gate, grad_up, hidden, room, width); };
  if (up != nullptr) {
    mask != nullptr ? run(backward_terms<T, Activation, true, true>) : run(backward_terms<T, Activation, true, false>);
  } else {
    mask != nullptr ? run(backward_terms<T, Activation, false, true>) : run(backward_terms<T, Activation, false, false>);
  }
  return fold(room, width);
}

}  // namespace dmoe
