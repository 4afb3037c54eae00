// Row kernels of moe_mlp: gather, the activation forward and backward, and the weighted sum of a token's rows.
#pragma once

#include <cstdint>

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

// out[c] = first[c] * first_weight + second[c] * second_weight
template <typename T>
DMOE_SIMD void combine_two(const T* first, Accumulate<T> first_weight, const T* second, Accumulate<T> second_weight,
                           T* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(out + c, load(first + c) * first_weight + load(second + c) * second_weight);
}

template <typename T>
DMOE_SIMD void store_row(const Accumulate<T>* sum, T* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(out + c, sum[c]);
}

// In 16 running sums, always the same ones: vectorised, and the same bits on every instruction set.
template <typename T>
DMOE_SIMD Accumulate<T> dot(const T* a, const T* b, int64_t width) {
  constexpr int64_t kLanes = 16;
  using A = Accumulate<T>;
  A sums[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += load(a + c + lane) * load(b + c + lane);
  }
  A total = 0;
  for (; c < width; ++c) total += load(a + c) * load(b + c);
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

// hidden = act(gate) * up * scale * mask; `up` and `mask` may be null.
template <typename T, typename Activation>
DMOE_SIMD void activate_row(const T* gate, const T* up, Accumulate<T> scale, const Accumulate<T>* mask, T* hidden,
                            int64_t width) {
  if (up != nullptr) {
    for (int64_t c = 0; c < width; ++c) store(hidden + c, Activation::value(load(gate + c)) * load(up + c) * scale);
  } else {
    for (int64_t c = 0; c < width; ++c) store(hidden + c, Activation::value(load(gate + c)) * scale);
  }
  if (mask != nullptr) {
    for (int64_t c = 0; c < width; ++c) store(hidden + c, load(hidden + c) * mask[c]);
  }
}

// Given the gradient g of the (masked, unscaled) hidden row: writes the gradient of gate and up for scale * g, the hidden
// row times scale, and returns <hidden, g>, the gradient of scale. `hidden` may be `g`'s own memory.
template <typename T, typename Activation>
DMOE_SIMD Accumulate<T> activate_row_backward(const T* gate, const T* up, const T* g, Accumulate<T> scale,
                                              const Accumulate<T>* mask, T* grad_gate, T* grad_up, T* hidden,
                                              int64_t width) {
  using A = Accumulate<T>;
  constexpr int64_t kLanes = 16;
  A sums[kLanes] = {};
  const auto element = [&](int64_t c) DMOE_INLINE_LAMBDA {
    const A keep = mask == nullptr ? A(1) : mask[c];
    const A grad = load(g + c) * keep;
    A value, slope;
    Activation::both(load(gate + c), value, slope);
    A product = value * grad;
    if (up != nullptr) {
      const A u = load(up + c);
      store(grad_up + c, scale * grad * value);
      slope *= u;
      product *= u;
      value *= u;
    }
    store(grad_gate + c, scale * grad * slope);
    store(hidden + c, scale * keep * value);
    return product;
  };
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += element(c + lane);
  }
  A total = 0;
  for (; c < width; ++c) total += element(c);
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

}  // namespace dmoe
