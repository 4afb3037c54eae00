// Everything between one token's router logits and its choice: scores, the K best (with a bias, in the best groups), and
// their gate weights. dmoe/ops/router_top_k.py says what they mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "activation.h"
#include "check.h"
#include "gate_rows.h"
#include "moe_rows.h"
#include "topk_rows.h"

namespace dmoe {

struct RouterRule {
  int64_t experts, top_k;
  bool softmax;  // else sigmoid
  int64_t groups, top_groups;
  bool top2_sum;
  double normalization, scale;
};

inline RouterRule router_rule(int64_t experts, int64_t top_k, const std::string& score_function, int64_t groups,
                              int64_t top_groups, const std::string& group_score, double normalization, double scale) {
  const auto expect = [](bool holds, const char* name, const char* expected, const auto& got) {
    DMOE_CHECK(holds, "router_top_k: ", name, ": expected ", expected, ", got ", got);
  };
  expect(top_k >= 1 && top_k <= experts, "top_k", "1 to the number of experts", top_k);
  expect(score_function == "softmax" || score_function == "sigmoid", "score_function", "softmax or sigmoid", score_function);
  expect(groups >= 1 && experts % groups == 0, "num_groups", "a divisor of the number of experts", groups);
  expect(top_groups >= 1 && top_groups <= groups, "top_k_groups", "1 to num_groups", top_groups);
  expect(top_k <= experts / groups * top_groups, "top_k", "at most the experts of top_k_groups groups", top_k);
  expect(group_score == "top2_sum" || group_score == "max", "group_score", "top2_sum or max", group_score);
  return {experts, top_k, score_function == "softmax", groups, top_groups, group_score == "top2_sum", normalization, scale};
}

// out[c] = e^(x[c] - shift), 0 where that is below the smallest normal number; NaN stays NaN.
template <typename T, typename A>
DMOE_SIMD void exponentials(const T* x, A shift, A* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    const A power = load(x + c) - shift;
    out[c] = power < A(-87.33) ? A(0) : exponential(power);
  }
}
inline void exponentials(const double* x, double shift, double* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) out[c] = std::exp(x[c] - shift);
}
template <typename T, typename A>
DMOE_SIMD void divided(const A* values, A by, T* out, int64_t width) {
  for (int64_t c = 0; c < width; ++c) store(out + c, values[c] / by);
}

// out[c] = 1 / (1 + e^-x[c]); of large numbers one by one, which come out smaller than a vector's exponential gets.
template <typename T>
DMOE_SIMD void sigmoids_of_small(const T* x, T* out, int64_t width) {
  using A = Accumulate<T>;
  for (int64_t c = 0; c < width; ++c) {
    const A number = load(x + c), small = exponential(number < 0 ? number : -number);
    store(out + c, (number < 0 ? small : A(1)) / (A(1) + small));  // NaN takes neither sign
  }
}
template <typename T>
void sigmoids(const T* x, T* out, int64_t width) {
  using A = Accumulate<T>;
  bool all_small = true;
  for (int64_t c = 0; c < width; ++c) all_small &= std::abs(load(x + c)) < A(80);
  if (all_small) return sigmoids_of_small<T>(x, out, width);
  for (int64_t c = 0; c < width; ++c) {
    const A number = load(x + c), small = std::exp(number < 0 ? number : -number);
    store(out + c, (number < 0 ? small : A(1)) / (A(1) + small));
  }
}

// The rows of one thread.
template <typename T>
class TokenRouter {
 public:
  using A = Accumulate<T>;

  explicit TokenRouter(const RouterRule& rule)
      : rule_(rule), gate_shape_{0, rule.experts, rule.top_k, rule.normalization, false, rule.scale},
        gates_(gate_shape_), best_(rule.experts, rule.top_k), best_groups_(rule.groups, rule.top_groups),
        numbers_(rule.experts), room_(rule.experts), grad_(rule.experts), biased_(rule.experts), ranks_(rule.groups),
        chosen_groups_(rule.top_groups) {}

  // Scores of one token's logits, (E,); also the logarithm of the sum of their exponentials, where it is asked for.
  void score(const T* logits, T* scores, A* log_z) {
    const int64_t E = rule_.experts;
    A total = 0;
    if (rule_.softmax || log_z != nullptr) total = exponentials_of(logits);
    if (log_z != nullptr) *log_z = std::isinf(largest_) ? (nan_ ? total : largest_) : largest_ + std::log(total);
    if (rule_.softmax) return divided<T, A>(numbers_.data(), total, scores, E);
    sigmoids(logits, scores, E);
  }

  // The K chosen experts, best first; `bias` (E,) is added for the choice alone, or null.
  void choose(const T* scores, const float* bias, int64_t* ids) {
    const int64_t E = rule_.experts;
    if (bias == nullptr && rule_.top_groups == rule_.groups) return best_.select(scores, ids);
    for (int64_t e = 0; e < E; ++e) {
      biased_[e] = scores[e];
      if (bias != nullptr) store(biased_.data() + e, load(scores + e) + static_cast<A>(bias[e]));
    }
    if (rule_.top_groups < rule_.groups) leave_best_groups();
    best_.select(biased_.data(), ids);
  }

  void weigh(const T* scores, const int64_t* ids, T* weights) {
    gates_.read(scores, ids, nullptr);
    gates_.write(weights);
  }

  // The entropy of the scores as a distribution over experts, nats; of those that score() made last.
  A entropy(const T* logits, const T* scores) {
    const int64_t E = rule_.experts;
    A sum = 0;
    for (int64_t e = 0; e < E && !rule_.softmax; ++e) sum += load(scores + e);
    A out = 0;
    for (int64_t e = 0; e < E; ++e) {
      const A p = rule_.softmax ? load(scores + e) : load(scores + e) / (sum + std::numeric_limits<A>::min());
      if (rule_.softmax) {  // ln p = x - largest - ln(total)
        out += p == 0 ? A(0) : p * (largest_ - load(logits + e));
      } else {
        out -= p == 0 ? A(0) : p * std::log(p);
      }
    }
    return rule_.softmax ? out + std::log(total_) : out;
  }

  // grad_logits (E,): `grad_scores` (E,), `grad_log_z` (one number) and `grad_weights` (K,) may each be null; `logits`
  // may, where scores are softmax's or nobody asks for log_z.
  void backward(const T* grad_scores, const T* grad_log_z, const T* grad_weights, const T* scores, const T* logits,
                const int64_t* ids, T* grad_logits) {
    const int64_t E = rule_.experts;
    A* grad = grad_.data();
    for (int64_t e = 0; e < E; ++e) grad[e] = grad_scores == nullptr ? A(0) : load(grad_scores + e);
    if (grad_weights != nullptr) {
      gates_.read(scores, ids, nullptr);
      gates_.add_gradient(grad_weights, ids, grad);
    }
    const A of_z = grad_log_z == nullptr ? A(0) : load(grad_log_z);
    if (rule_.softmax) {
      A dot = 0;
      for (int64_t e = 0; e < E; ++e) dot += grad[e] * load(scores + e);
      for (int64_t e = 0; e < E; ++e) store(grad_logits + e, load(scores + e) * (grad[e] - dot + of_z));
      return;
    }
    const A total = grad_log_z == nullptr ? A(1) : exponentials_of(logits);
    for (int64_t e = 0; e < E; ++e) {
      const A s = load(scores + e), p = grad_log_z == nullptr ? A(0) : of_z * (numbers_[e] / total);
      store(grad_logits + e, grad[e] * (s * (A(1) - s)) + p);
    }
  }

 private:
  // e^(x - the largest) to numbers_, and their sum, with NaN for what has one.
  A exponentials_of(const T* logits) {
    const int64_t E = rule_.experts;
    largest_ = -std::numeric_limits<A>::infinity(), nan_ = false;
    for (int64_t e = 0; e < E; ++e) {
      const A x = load(logits + e);
      largest_ = x > largest_ ? x : largest_;
      nan_ |= x != x;
    }
    exponentials(logits, largest_, numbers_.data(), E);
    std::copy(numbers_.begin(), numbers_.end(), room_.begin());
    return total_ = fold(room_.data(), E);
  }

  void leave_best_groups() {
    const int64_t size = rule_.experts / rule_.groups;
    const bool two = rule_.top2_sum && size > 1;
    for (int64_t g = 0; g < rule_.groups; ++g) {
      int64_t first[2];
      TopKRows<T> of_group(size, two ? 2 : 1);
      of_group.select(biased_.data() + g * size, first);
      const A sum = load(biased_.data() + g * size + first[0]) + (two ? load(biased_.data() + g * size + first[1]) : A(0));
      store(ranks_.data() + g, sum);
    }
    best_groups_.select(ranks_.data(), chosen_groups_.data());
    for (int64_t g = 0; g < rule_.groups; ++g) {
      if (std::find(chosen_groups_.begin(), chosen_groups_.end(), g) != chosen_groups_.end()) continue;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) store(biased_.data() + e, -std::numeric_limits<A>::infinity());
    }
  }

  RouterRule rule_;
  GateShape gate_shape_;
  GateChoices<T, int64_t> gates_;
  TopKRows<T> best_, best_groups_;
  std::vector<A> numbers_, room_, grad_;
  std::vector<T> biased_, ranks_;
  std::vector<int64_t> chosen_groups_;
  A largest_ = 0, total_ = 1;
  bool nan_ = false;
};

}  // namespace dmoe
