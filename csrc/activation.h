// The experts' activations and their derivatives; dmoe/ops/activation.py says what they mean.
//
// float uses branch-free polynomials that the compiler vectorises, good to about 2 ulp; double uses the C library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <locale>
#include <sstream>
#include <string>

#include "check.h"
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

// tanh(x) is x + x^3 P(x^2) up to 0.625, P fitted to 5e-9 of the result; beyond, 1 - tanh has no cancellation.
DMOE_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }
DMOE_INLINE float hyperbolic_tangent(float x) {
  const float u = x < 0.0f ? -x : x, s = x * x;
  float p = -0.00568128796f;
  p = p * s + 0.0206186287f;
  p = p * s - 0.053733699f;
  p = p * s + 0.13331373f;
  p = p * s - 0.333332807f;
  const float far = 1.0f - 2.0f / (exponential(2.0f * u) + 1.0f);
  return u < 0.625f ? x + x * s * p : (x < 0.0f ? -far : far);
}

// Each activation: value(x), and both(x, value, slope); of up, which multiplies the gate's, up_value and up_both.
struct UpAsItIs {
  template <typename A>
  DMOE_INLINE A up_value(A up) const {
    return up;
  }
  template <typename A>
  DMOE_INLINE void up_both(A up, A& value, A& slope) const {
    value = up, slope = A(1);
  }
};

struct Relu : UpAsItIs {
  template <typename A>
  DMOE_INLINE A value(A x) const {
    return x < A(0) ? A(0) : x;  // keeps NaN
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    value = x < A(0) ? A(0) : x;
    slope = x > A(0) ? A(1) : A(0);
  }
};

struct ReluSquared : UpAsItIs {
  template <typename A>
  DMOE_INLINE A value(A x) const {
    const A r = x < A(0) ? A(0) : x;
    return r * r;
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    const A r = x < A(0) ? A(0) : x;
    value = r * r, slope = A(2) * r;
  }
};

struct Silu : UpAsItIs {
  template <typename A>
  DMOE_INLINE A value(A x) const {
    return x / (A(1) + exponential(-x));
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    const A e = exponential(-x), s = A(1) / (A(1) + e);
    value = x * s;
    slope = s + x * s * (e * s);  // 1 - s = e s, without the cancellation
  }
};

struct Sigmoid : UpAsItIs {
  template <typename A>
  DMOE_INLINE A value(A x) const {
    return A(1) / (A(1) + exponential(-x));
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    const A e = exponential(-x);
    value = A(1) / (A(1) + e);
    slope = value * (e * value);  // 1 - s = e s, without the cancellation
  }
};

struct Gelu : UpAsItIs {
  template <typename A>
  DMOE_INLINE static A cdf(A x) {
    const A tail = A(0.5) * erfc_positive((x < A(0) ? -x : x) * A(0.70710678118654752440));
    return x < A(0) ? tail : A(1) - tail;
  }
  template <typename A>
  DMOE_INLINE A value(A x) const {
    return x * cdf(x);
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    const A phi = cdf(x);
    value = x * phi;
    slope = phi + x * exponential(A(-0.5) * x * x) * A(0.39894228040143267794);
  }
};

struct GeluTanh : UpAsItIs {
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
  DMOE_INLINE A value(A x) const {
    A complement, inner_slope;
    return x * half_plus_half_tanh(x, complement, inner_slope);
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    A complement, inner_slope;
    const A s = half_plus_half_tanh(x, complement, inner_slope);
    value = x * s;
    slope = s + x * A(2) * s * complement * inner_slope;
  }
};

// Derivatives of the clamps are PyTorch's: passed on at a limit. NaN stays NaN.
struct ClampedSwiGlu {
  double limit, alpha, up_offset;

  template <typename A>
  DMOE_INLINE A value(A x) const {
    const A g = x > A(limit) ? A(limit) : x;
    return g / (A(1) + exponential(-A(alpha) * g));
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    const A g = x > A(limit) ? A(limit) : x, z = A(alpha) * g;
    const A e = exponential(-z), s = A(1) / (A(1) + e);
    value = g * s;
    slope = x > A(limit) ? A(0) : s + z * s * (e * s);
  }
  template <typename A>
  DMOE_INLINE A up_value(A up) const {
    const A below = up > A(limit) ? A(limit) : up;
    return (below < -A(limit) ? -A(limit) : below) + A(up_offset);
  }
  template <typename A>
  DMOE_INLINE void up_both(A up, A& value, A& slope) const {
    value = up_value(up);
    const A size = up < A(0) ? -up : up;
    slope = size > A(limit) ? A(0) : A(1);
  }
};

struct SoftcappedSwiGlu {
  double gate_cap, up_cap;

  template <typename A>
  DMOE_INLINE A value(A x) const {
    return A(gate_cap) * hyperbolic_tangent(x / A(gate_cap)) / (A(1) + exponential(-x));
  }
  template <typename A>
  DMOE_INLINE void both(A x, A& value, A& slope) const {
    const A t = hyperbolic_tangent(x / A(gate_cap)), e = exponential(-x), s = A(1) / (A(1) + e);
    value = A(gate_cap) * t * s;
    slope = (A(1) - t * t) * s + value * (e * s);
  }
  template <typename A>
  DMOE_INLINE A up_value(A up) const {
    return A(up_cap) * hyperbolic_tangent(up / A(up_cap));
  }
  template <typename A>
  DMOE_INLINE void up_both(A up, A& value, A& slope) const {
    const A t = hyperbolic_tangent(up / A(up_cap));
    value = A(up_cap) * t;
    slope = A(1) - t * t;
  }
};

// Reads "kind(1.0,2.5)", as dmoe/activations.py writes it, into as many numbers as there are; false for other text.
template <typename... Numbers>
bool read_numbers(const std::string& text, const std::string& kind, Numbers&... numbers) {
  if (text.compare(0, kind.size() + 1, kind + "(") != 0) return false;
  std::istringstream rest(text.substr(kind.size() + 1));
  rest.imbue(std::locale::classic());  // whatever the program's decimal point is
  rest >> std::noskipws;
  const size_t count = sizeof...(Numbers);
  size_t read = 0;
  const auto next = [&](double& number) {
    char end = 0;
    return rest >> number && std::isfinite(number) && rest >> end && end == (++read < count ? ',' : ')');
  };
  return (next(numbers) && ...) && rest.peek() == std::istringstream::traits_type::eof();
}

// fn(activation) for the activation that the text names.
template <typename Function>
auto with_activation(const std::string& text, bool gated, const Function& fn) {
  if (text == "silu") return fn(Silu{});
  if (text == "gelu") return fn(Gelu{});
  if (text == "gelu_tanh") return fn(GeluTanh{});
  if (text == "relu") return fn(Relu{});
  if (text == "relu_squared") return fn(ReluSquared{});
  if (text == "sigmoid") return fn(Sigmoid{});
  ClampedSwiGlu clamped{};
  SoftcappedSwiGlu softcapped{};
  const bool is_clamped = read_numbers(text, "clamped_swiglu", clamped.limit, clamped.alpha, clamped.up_offset);
  DMOE_CHECK(is_clamped || read_numbers(text, "softcapped_swiglu", softcapped.gate_cap, softcapped.up_cap),
             "moe_mlp: activation: expected gelu, gelu_tanh, relu, relu_squared, sigmoid, silu, clamped_swiglu(limit,"
             "alpha,up_offset) or softcapped_swiglu(gate_cap,up_cap), got ", text);
  DMOE_CHECK(gated, "moe_mlp: activation: expected gelu, gelu_tanh, relu, relu_squared, sigmoid or silu without a gate, "
             "got ", text);
  if (is_clamped) return fn(clamped);
  return fn(softcapped);
}

}  // namespace dmoe
