// balanced_assignment on the CPU: successive shortest paths between the experts, exact.
//
// Every token begins at its cheapest expert (a cost is a negated score), which nothing beats while an expert may hold
// any number. Then tokens leave the experts that hold too many along shortest paths to those that hold too few. A path
// a -> b -> c moves one token from a to b and another one from b to c. Prices of the experts keep every token where
// cost + price is least: no step is then shorter than 0, so that Dijkstra's search applies, and the assignment is
// optimal for the loads that it has at that moment, at last for even ones. (Ahuja, Magnanti, Orlin: Network Flows,
// 1993, chapter 9.7: any path from any excess to any deficit will do, as long as it is a shortest one.)
//
// The cheapest step from a to b is the minimum over a's tokens; trees hold these minima (class Steps), for all b at
// once, so that their inner loops run over rows of numbers. One thread does it all: reading the scores takes about half
// of the time and searching, which has to be in order, the rest; a second thread gained nothing where that was
// measured.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "pages.h"
#include "simd.h"

namespace dmoe {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kHuge = 0x1p900;  // costs below it can be added along any path
constexpr int64_t kLanes = 8;      // rows are padded to a multiple of it
constexpr int64_t kFan = 4;        // children of a node

// The costs of one token, padded with infinity; false when a number is not finite, or huge.
template <typename Score>
DMOE_SIMD bool negate_row(const Score* scores, double* costs, int64_t width) {
  int64_t odd = 0;
  for (int64_t b = 0; b < width; ++b) {
    const double cost = -static_cast<double>(load(scores + b));
    costs[b] = cost;
    odd |= !(std::abs(cost) < kHuge);
  }
  return odd == 0;
}

// Eight numbers at once, as GCC and Clang spell it: no loop vectoriser makes one of a search for a place.
typedef double Doubles __attribute__((vector_size(8 * kLanes), aligned(8), may_alias));
typedef int64_t Places __attribute__((vector_size(8 * kLanes)));

// The place of the least values[b] + extra[b], the lowest one among equals.
DMOE_SIMD int64_t least(const double* values, const double* extra, int64_t width) {
  Doubles best;
  Places place = {0, 1, 2, 3, 4, 5, 6, 7}, where = place;
  for (int64_t b = 0; b < width; b += kLanes, place += kLanes) {
    const Doubles value =
        *reinterpret_cast<const Doubles*>(values + b) + *reinterpret_cast<const Doubles*>(extra + b);
    if (b == 0) best = value;
    const auto less = value < best;
    best = less ? value : best;
    where = less ? place : where;
  }
  int64_t found = 0;
  for (int64_t k = 1; k < kLanes; ++k) {
    if (best[k] < best[found] || (best[k] == best[found] && where[k] < where[found])) found = k;
  }
  return where[found];
}

DMOE_INLINE double lesser(double x, double y) { return x < y ? x : y; }

// out[b]: the cheapest step to b that one of the tokens can make; own[k] is what token k costs where it is.
DMOE_SIMD void cheapest_of_tokens(const double* const costs[kFan], const double own[kFan], double* out, int64_t width) {
  const double *x = costs[0], *y = costs[1], *z = costs[2], *w = costs[3];
  const double own_x = own[0], own_y = own[1], own_z = own[2], own_w = own[3];
  for (int64_t b = 0; b < width; ++b) {
    out[b] = lesser(lesser(x[b] - own_x, y[b] - own_y), lesser(z[b] - own_z, w[b] - own_w));
  }
}

DMOE_SIMD void cheapest_of_nodes(const double* const nodes[kFan], double* out, int64_t width) {
  const double *x = nodes[0], *y = nodes[1], *z = nodes[2], *w = nodes[3];
  for (int64_t b = 0; b < width; ++b) out[b] = lesser(lesser(x[b], y[b]), lesser(z[b], w[b]));
}

// Dijkstra's step: every way on from expert `a`. A length that rounding has left below 0 counts as 0, so that the
// distance of a settled expert never falls.
DMOE_SIMD void relax(const double* steps, const double* prices, int64_t a, double* distance, int64_t* parent,
                     int64_t width) {
  const double start = distance[a], price = prices[a];
  for (int64_t b = 0; b < width; ++b) {
    const double length = (steps[b] - price) + prices[b];
    const double through = start + (length > 0 ? length : 0);
    const bool shorter = through < distance[b];
    distance[b] = shorter ? through : distance[b];
    parent[b] = shorter ? a : parent[b];
  }
}

// What each token costs at each expert, in rows that are padded with infinity.
struct Costs {
  int64_t tokens, experts, stride;
  std::unique_ptr<double[]> values;

  Costs(int64_t num_tokens, int64_t num_experts)
      : tokens(num_tokens), experts(num_experts), stride((num_experts + kLanes - 1) / kLanes * kLanes),
        values(new double[num_tokens * stride]) {
    prefer_huge_pages(values.get(), num_tokens * stride * static_cast<int64_t>(sizeof(double)));
  }
  const double* row(int64_t token) const { return values.get() + token * stride; }

  template <typename Score>
  void read(const Score* scores) {
    bool plain = true;
    for (int64_t t = 0; t < tokens; ++t) {
      double* to = values.get() + t * stride;
      plain &= negate_row(scores + t * experts, to, experts);
      std::fill(to + experts, to + stride, kInfinity);
    }
    if (!plain) mend();
  }

 private:
  // Scores that are not finite count as the smallest finite one; huge ones are scaled, which changes no comparison.
  void mend() {
    double highest = -kInfinity, largest = 0;
    for_each([&](double& cost) {
      if (std::isfinite(cost)) {
        highest = std::max(highest, cost);
        largest = std::max(largest, std::abs(cost));
      }
    });
    const double worst = std::isfinite(highest) ? highest : 0, scale = largest < kHuge ? 1 : 0x1p-200;
    for_each([&](double& cost) { cost = (std::isfinite(cost) ? cost : worst) * scale; });
  }

  template <typename Body>
  void for_each(const Body& body) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < experts; ++e) body(values[t * stride + e]);
    }
  }
};

// The cheapest steps from each expert to each other one. An expert's tokens stand in slots; over the slots stands a
// tree whose nodes hold, for every other expert, the cheapest step of the tokens below. Which token makes it is found
// by going down. A token that leaves or comes renews one node of each level.
class Steps {
 public:
  // tokens_of: the tokens of each expert; one that holds fewer than `capacity` gets slots for the rest.
  Steps(const Costs& costs, const std::vector<std::vector<int64_t>>& tokens_of, int64_t capacity)
      : costs_(costs), trees_(costs.experts), nothing_(costs.stride, kInfinity) {
    int64_t slots = 0, nodes = 0;
    for (int64_t e = 0; e < costs.experts; ++e) {
      Tree& tree = trees_[e];
      tree.first_slot = slots;
      tree.slots = std::max(static_cast<int64_t>(tokens_of[e].size()), capacity);
      slots += tree.slots;
      for (int64_t size = tree.slots; tree.levels.empty() || size > 1;) {
        size = (size + kFan - 1) / kFan;
        tree.levels.push_back({nodes, size});
        nodes += size;
      }
    }
    token_.assign(slots, -1);
    nodes_.reset(new double[nodes * costs.stride]);
    prefer_huge_pages(nodes_.get(), nodes * costs.stride * static_cast<int64_t>(sizeof(double)));
    for (int64_t e = 0; e < costs.experts; ++e) {
      std::copy(tokens_of[e].begin(), tokens_of[e].end(), token_.begin() + trees_[e].first_slot);
      for (size_t level = 0; level < trees_[e].levels.size(); ++level) {
        for (int64_t index = 0; index < trees_[e].levels[level].size; ++index) compute(e, level, index);
      }
    }
  }

  // The cheapest step from expert a to each one; infinity where a holds no token.
  const double* from(int64_t a) const { return node(trees_[a].levels.back(), 0); }

  // The slot whose token makes the cheapest step from a to b, the lowest one among equals.
  int64_t slot_of(int64_t a, int64_t b) const {
    const Tree& tree = trees_[a];
    const double wanted = from(a)[b];
    int64_t index = 0;
    for (size_t level = tree.levels.size() - 1; level > 0; --level) {
      index *= kFan;
      while (node(tree.levels[level - 1], index)[b] != wanted) ++index;
    }
    for (index *= kFan;; ++index) {
      const int64_t token = token_[tree.first_slot + index];
      if (token >= 0 && costs_.row(token)[b] - costs_.row(token)[a] == wanted) return index;
    }
  }

  // Puts a token (-1: none) into a slot of expert e, and returns the one that was there. Renew the slot afterwards.
  int64_t replace(int64_t e, int64_t slot, int64_t token) {
    std::swap(token_[trees_[e].first_slot + slot], token);
    return token;
  }

  void renew(int64_t e, int64_t slot) {
    for (size_t level = 0; level < trees_[e].levels.size(); ++level) compute(e, level, slot /= kFan);
  }

 private:
  struct Level {
    int64_t first, size;  // in nodes
  };
  struct Tree {
    int64_t first_slot, slots;
    std::vector<Level> levels;  // the last one is the root
  };

  const Costs& costs_;
  std::vector<Tree> trees_;
  std::vector<double> nothing_;  // stands for tokens and nodes that are not there
  std::vector<int64_t> token_;   // by slot
  std::unique_ptr<double[]> nodes_;

  const double* node(const Level& level, int64_t index) const {
    return nodes_.get() + (level.first + index) * costs_.stride;
  }

  void compute(int64_t e, size_t level, int64_t index) {
    const Tree& tree = trees_[e];
    double* out = nodes_.get() + (tree.levels[level].first + index) * costs_.stride;
    const double* below[kFan];
    if (level == 0) {
      double own[kFan];
      for (int64_t k = 0; k < kFan; ++k) {
        const int64_t slot = index * kFan + k;
        const int64_t token = slot < tree.slots ? token_[tree.first_slot + slot] : -1;
        below[k] = token < 0 ? nothing_.data() : costs_.row(token);
        own[k] = token < 0 ? 0 : below[k][e];
      }
      cheapest_of_tokens(below, own, out, costs_.stride);
    } else {
      const Level& children = tree.levels[level - 1];
      for (int64_t k = 0; k < kFan; ++k) {
        const int64_t child = index * kFan + k;
        below[k] = child < children.size ? node(children, child) : nothing_.data();
      }
      cheapest_of_nodes(below, out, costs_.stride);
    }
  }
};

class Assignment {
 public:
  Assignment(const Costs& costs, int64_t* expert_of)
      : costs_(costs), capacity_(costs.tokens / costs.experts), expert_of_(expert_of), tokens_of_(costs.experts),
        load_(costs.experts), prices_(costs.stride, 0) {}

  void solve() {
    choose_freely();
    relieve_hot_experts();
    for (int64_t e = 0; e < costs_.experts; ++e) {
      load_[e] = static_cast<int64_t>(tokens_of_[e].size());
      for (const int64_t token : tokens_of_[e]) expert_of_[token] = e;
    }
    Steps steps(costs_, tokens_of_, capacity_);
    while (search(steps)) walk(steps);
  }

 private:
  const Costs& costs_;
  const int64_t capacity_;
  int64_t* const expert_of_;                     // by token: the result
  std::vector<std::vector<int64_t>> tokens_of_;  // by expert, before the search
  std::vector<int64_t> load_;                    // by expert: how many tokens it holds
  std::vector<double> prices_;                   // by expert
  // What a search finds, by expert: the way from the nearest one that holds too many, the expert before on it (-1: it
  // begins here) and what the step from that one cost.
  std::vector<double> distance_, closed_, step_;
  std::vector<int64_t> parent_;
  std::vector<int64_t> ends_;  // those that hold too few, the nearest first

  void choose_freely() {
    for (int64_t t = 0; t < costs_.tokens; ++t) {
      tokens_of_[least(costs_.row(t), prices_.data(), costs_.stride)].push_back(t);
    }
  }

  // An expert that holds far too many gets at once the price at which only its share stays, as in an auction, and the
  // others go where they then cost least. One path for each of them would give the same, later.
  void relieve_hot_experts() {
    struct Leave {
      double loss;  // what it costs more there
      int64_t token, to;
    };
    std::vector<Leave> leaves;
    for (int64_t e = 0; e < costs_.experts; ++e) {
      std::vector<int64_t>& tokens = tokens_of_[e];
      const int64_t load = static_cast<int64_t>(tokens.size()), excess = load - capacity_;
      if (2 * load <= 3 * capacity_) continue;
      const double price = prices_[e];
      prices_[e] = kInfinity;  // look elsewhere
      leaves.clear();
      for (const int64_t t : tokens) {
        const double* row = costs_.row(t);
        const int64_t to = least(row, prices_.data(), costs_.stride);
        leaves.push_back({(row[to] + prices_[to]) - (row[e] + price), t, to});
      }
      std::nth_element(leaves.begin(), leaves.begin() + (excess - 1), leaves.end(), [](const Leave& x, const Leave& y) {
        return x.loss < y.loss || (x.loss == y.loss && x.token < y.token);
      });
      prices_[e] = price + std::max(0.0, leaves[excess - 1].loss);
      tokens.clear();
      for (int64_t i = 0; i < load; ++i) tokens_of_[i < excess ? leaves[i].to : e].push_back(leaves[i].token);
    }
  }

  // Dijkstra's search from all experts that hold too many, until all that hold too few are reached; false when none
  // does. Prices then change by the distances, and every step on a way that was found has length 0.
  bool search(const Steps& steps) {
    int64_t missing = 0;
    distance_.assign(costs_.stride, kInfinity);
    closed_.assign(costs_.stride, 0);
    step_.assign(costs_.stride, 0);
    parent_.assign(costs_.stride, -1);
    ends_.clear();
    for (int64_t e = 0; e < costs_.experts; ++e) {
      if (load_[e] > capacity_) distance_[e] = 0;
      missing += load_[e] < capacity_;
    }
    if (missing == 0) return false;
    double last = 0;
    while (missing > 0) {
      const int64_t a = least(distance_.data(), closed_.data(), costs_.stride);
      closed_[a] = kInfinity;
      last = distance_[a];
      if (parent_[a] >= 0) step_[a] = steps.from(parent_[a])[a];
      if (load_[a] < capacity_) {
        ends_.push_back(a);
        --missing;
      }
      relax(steps.from(a), prices_.data(), a, distance_.data(), parent_.data(), costs_.stride);
    }
    for (int64_t e = 0; e < costs_.experts; ++e) prices_[e] -= lesser(distance_[e], last);
    return true;
  }

  // Moves tokens along the ways that a search found, as long as they are as short as they were: a step that another way
  // has taken may not be. The first way always is.
  void walk(Steps& steps) {
    for (const int64_t end : ends_) {
      while (load_[end] < capacity_) {
        bool as_short = true;
        int64_t begin = end;
        for (; parent_[begin] >= 0; begin = parent_[begin]) {
          as_short = as_short && steps.from(parent_[begin])[begin] <= step_[begin];
        }
        if (!as_short || load_[begin] <= capacity_) break;
        int64_t slot = load_[end];  // an expert that holds too few never gave one away: its tokens fill the first slots
        for (int64_t e = end; e != begin; e = parent_[e]) {
          const int64_t from = parent_[e], left = steps.slot_of(from, e);
          const int64_t token = steps.replace(from, left, -1);
          expert_of_[token] = e;
          steps.replace(e, slot, token);
          steps.renew(e, slot);
          slot = left;
        }
        steps.renew(begin, slot);
        ++load_[end];
        --load_[begin];
      }
    }
  }
};

Tensor balanced_assignment(const Tensor& scores) {
  check_dim("balanced_assignment", "scores", scores, 2);
  const int64_t num_tokens = scores.size(0), num_experts = scores.size(1);
  DMOE_CHECK(num_experts > 0, "balanced_assignment: scores: expected shape (T, E) with at least one expert, got ",
             shape_of(scores));
  DMOE_CHECK(num_tokens % num_experts == 0,
             "balanced_assignment: scores: expected a number of tokens divisible by the num_experts = ", num_experts,
             ", got ", num_tokens);
  const Tensor contiguous = torch::stable::contiguous(scores);
  Tensor out = torch::stable::new_empty(contiguous, {num_tokens}, ScalarType::Long);
  Costs costs(num_tokens, num_experts);
  dispatch_floating("balanced_assignment", "scores", contiguous, [&](auto zero) {
    costs.read(static_cast<const decltype(zero)*>(contiguous.const_data_ptr()));
  });
  if (num_tokens > 0) Assignment(costs, static_cast<int64_t*>(out.data_ptr())).solve();
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("balanced_assignment", TORCH_BOX(&dmoe::balanced_assignment)); }
