// The experts' activations and their derivatives; dmoe/ops/activation.py says what they mean.
//
// float uses branch-free polynomials that the compiler vectorises, good to about 2 ulp; double uses the C library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace dmoe {

// Large arguments stay finite in both precisions, so that exponential(x) / (1 + exponential(x)) never is inf / inf.
DMOE_INLINE double exponential(double x) { return std::exp(x > 700.0 ? 700.0 : x); }

// exp(x) = 2^n exp(r) with |r| <= ln(2)/2. NaN stays NaN: a comparison with it is false.
DMOE_INLINE float exponential(float x) {
  x = x > 88.37f ? 88.37f : x;
  x = x < -87.33f ? -87.33f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.98756911e-4f;
  p = p * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t power = (bits_of<uint32_t>(shifted) + 127u) << 23;  // the magic's own bits fall off the top
  return p * bits_of<float>(power);
}

// erfc(u) for u >= 0.
DMOE_INLINE double erfc_positive(double u) { return std::erfc(u); }

// erfc(u) = exp(-u P(u)). Up to 4.2, P is fitted at Chebyshev nodes: erfc within 3.4e-8, relatively within 4e-6. Above,
// P(u) - u varies slowly and is fitted instead, so that the tail is relatively right (2e-5) down to where it vanishes.
DMOE_INLINE float erfc_positive(float u) {
  float p = -8.80009691e-08f;
  p = p * u + 2.29549176e-06f;
  p = p * u - 2.6546974e-05f;
  p = p * u + 1.77955367e-04f;
  p = p * u - 7.43634353e-04f;
  p = p * u + 1.77434666e-03f;
  p = p * u - 2.07068124e-04f;
  p = p * u - 1.91521984e-02f;
  p = p * u + 1.02782823e-01f;
  p = p * u + 6.36618433e-01f;
  p = p * u + 1.12837919e+00f;
  const float v = u > 9.4f ? 9.4f : u;
  float q = 5.05880552e-07f;
  q = q * v - 2.53047184e-05f;
  q = q * v + 5.47031515e-04f;
  q = q * v - 6.7106828e-03f;
  q = q * v + 5.18113294e-02f;
  q = q * v - 2.68232818e-01f;
  q = q * v + 1.05417164e+00f;
  return exponential(-u * (u > 4.2f ? u + q : p));
}

// Each activation: value(x), and both(x, value, slope).
struct Relu {
  template <typename A>
  DMOE_INLINE static A value(A x) {
    return x < A(0) ? A(0) : x;  // keeps NaN
  }
  template <typename A>
  DMOE_INLINE static void both(A x, A& value, A& slope) {
    value = x < A(0) ? A(0) : x;
    slope = x > A(0) ? A(1) : A(0);
  }
};

struct Silu {
  template <typename A>
  DMOE_INLINE static A value(A x) {
    return x / (A(1) + exponential(-x));
  }
  template <typename A>
  DMOE_INLINE static void both(A x, A& value, A& slope) {
    const A e = exponential(-x), s = A(1) / (A(1) + e);
    value = x * s;
    slope = s + x * s * (e * s);  // 1 - s = e s, without the cancellation
  }
};

struct Gelu {
  template <typename A>
  DMOE_INLINE static A cdf(A x) {
    const A tail = A(0.5) * erfc_positive((x < A(0) ? -x : x) * A(0.70710678118654752440));
    return x < A(0) ? tail : A(1) - tail;
  }
  template <typename A>
  DMOE_INLINE static A value(A x) {
    return x * cdf(x);
  }
  template <typename A>
  DMOE_INLINE static void both(A x, A& value, A& slope) {
    const A phi = cdf(x);
    value = x * phi;
    slope = phi + x * exponential(A(-0.5) * x * x) * A(0.39894228040143267794);
  }
};

struct GeluTanh {
  template <typename A>
  DMOE_INLINE static A half_plus_half_tanh(A x, A& complement, A& inner_slope) {
    const A beta = A(0.79788456080286535588), kappa = A(0.044715);
    inner_slope = beta * (A(1) + A(3) * kappa * x * x);
    const A inner = beta * (x + kappa * x * x * x);
    const A e = exponential(A(-2) * inner), s = A(1) / (A(1) + e);  // s = (1 + tanh(inner)) / 2
    complement = e * s;
    return s;
  }
  template <typename A>
  DMOE_INLINE static A value(A x) {
    A complement, inner_slope;
    return x * half_plus_half_tanh(x, complement, inner_slope);
  }
  template <typename A>
  DMOE_INLINE static void both(A x, A& value, A& slope) {
    A complement, inner_slope;
    const A s = half_plus_half_tanh(x, complement, inner_slope);
    value = x * s;
    slope = s + x * A(2) * s * complement * inner_slope;
  }
};

}  // namespace dmoe
