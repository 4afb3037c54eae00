// One token's gate weights and their gradient: dmoe/ops/gate_weights.py has the formulas.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace dmoe {

struct GateShape {
  int64_t tokens, experts, top_k;
  double p;
  bool after_drop;
  double scale;
};

// One token's choices: which are kept, their scores, and the norm they are divided by (1 for none).
template <typename T, typename Id>
class GateChoices {
 public:
  using A = Accumulate<T>;

  explicit GateChoices(const GateShape& shape)
      : shape_(shape), picked_(shape.top_k), kept_(shape.top_k), counted_(shape.top_k) {}

  // `rows` of the plan, -1 where a choice was dropped; null where nothing was.
  void read(const T* scores, const Id* ids, const int32_t* rows) {
    constexpr A kTiny = std::is_same_v<T, Half> ? A(6.103515625e-05) : std::numeric_limits<A>::min();
    A largest = kTiny;
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      const bool chosen = ids[k] >= 0 && ids[k] < shape_.experts;
      picked_[k] = chosen ? load(scores + ids[k]) : A(0);
      kept_[k] = chosen && (rows == nullptr || rows[k] >= 0);
      counted_[k] = shape_.after_drop ? kept_[k] : chosen;
      if (counted_[k] && !(picked_[k] <= largest)) largest = picked_[k];  // takes NaN over
    }
    norm_ = A(1);
    const double p = shape_.p;
    if (p > 0) {  // relative to the largest: powers of small scores would underflow
      A sum = 0;
      for (int64_t k = 0; k < shape_.top_k; ++k) {
        if (counted_[k]) sum += power(picked_[k] / largest, p);
      }
      sum = p == 1 ? sum : p == 2 ? std::sqrt(sum) : std::pow(sum, static_cast<A>(1 / p));
      norm_ = largest * (sum < A(1) ? A(1) : sum);
    }
  }

  void write(T* weights) const {
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      store(weights + k, kept_[k] ? picked_[k] * static_cast<A>(shape_.scale) / norm_ : A(0));
    }
  }

  // grad_scores += the gradient of the scores, `grad` being that of the weights.
  template <typename S>
  void add_gradient(const T* grad, const Id* ids, S* grad_scores) const {
    A share = 0;  // sum over kept of the gradient with respect to g / n, times g / n
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      if (kept_[k]) share += load(grad + k) * static_cast<A>(shape_.scale) * picked_[k];
    }
    share /= norm_;
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      if (ids[k] < 0 || ids[k] >= shape_.experts) continue;
      A value = kept_[k] ? load(grad + k) * static_cast<A>(shape_.scale) : A(0);
      if (shape_.p > 0 && counted_[k]) value -= share * power(picked_[k] / norm_, shape_.p - 1);
      store(grad_scores + ids[k], load(grad_scores + ids[k]) + value / norm_);
    }
  }

 private:
  static A power(A x, double p) {
    if (p == 1) return x;
    if (p == 2) return x * x;
    return std::pow(x, static_cast<A>(p));
  }

  const GateShape& shape_;
  std::vector<A> picked_;
  std::vector<uint8_t> kept_, counted_;
  A norm_ = A(1);
};

}  // namespace dmoe
