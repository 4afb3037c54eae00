// topk_indices on the CPU: rows in parallel, each by a two-level tournament without branches on the data.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "check.h"

namespace dmoe {
namespace {

// An entry orders first by score, then the lower id first, as one unsigned comparison. Every entry is above kTaken.
//
// The key of a score: its bits, read as sign and magnitude, mapped to unsigned integers in the same order; -0 equals +0
// and every NaN is the largest key.
uint32_t key_of(float score) {
  if (score != score) return UINT32_MAX;
  const float no_negative_zero = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &no_negative_zero, sizeof bits);
  return bits ^ (bits >> 31 ? UINT32_MAX : UINT32_C(1) << 31);
}

uint64_t key_of(double score) {
  if (score != score) return UINT64_MAX;
  const double no_negative_zero = score + 0.0;
  uint64_t bits;
  std::memcpy(&bits, &no_negative_zero, sizeof bits);
  return bits ^ (bits >> 63 ? UINT64_MAX : UINT64_C(1) << 63);
}

struct Entry32 {
  uint64_t packed;  // key in the high half, ~id in the low half
  Entry32() : packed(0) {}
  Entry32(float score, uint32_t id) : packed(uint64_t{key_of(score)} << 32 | static_cast<uint32_t>(~id)) {}
  uint32_t id() const { return ~static_cast<uint32_t>(packed); }
  friend Entry32 larger(Entry32 a, Entry32 b) { return a.packed > b.packed ? a : b; }
};

struct Entry64 {
  uint64_t key;
  uint32_t inverted_id;
  Entry64() : key(0), inverted_id(0) {}
  Entry64(double score, uint32_t id) : key(key_of(score)), inverted_id(~id) {}
  uint32_t id() const { return ~inverted_id; }
  friend Entry64 larger(const Entry64& a, const Entry64& b) {
    return a.key > b.key || (a.key == b.key && a.inverted_id > b.inverted_id) ? a : b;
  }
};

// The row is cut into groups, and the largest entry of each group is kept. Each of the k rounds takes the largest of
// those and looks again at the one group it came from: E + k * (E / group + group) steps in all, against about
// E + k * E for repeated scans. A heap or an insertion list does fewer steps, but each is a branch that nothing
// predicts.
template <typename Score, typename Entry, int kGroup>
void select_rows(const Score* scores, int64_t* out, int64_t begin, int64_t end, int64_t num_experts, int64_t k) {
  using Wide = std::conditional_t<std::is_same_v<Score, double>, double, float>;
  const int64_t groups = (num_experts + kGroup - 1) / kGroup;
  std::vector<Entry> entries(groups * kGroup), best(groups);  // what lies beyond num_experts stays below every entry
  const auto best_of_group = [&](int64_t group) {
    const Entry* first = entries.data() + group * kGroup;
    Entry lanes[4] = {first[0], first[1], first[2], first[3]};  // four chains of comparisons, to overlap their latency
    for (int i = 4; i < kGroup; i += 4) {
      for (int lane = 0; lane < 4; ++lane) lanes[lane] = larger(lanes[lane], first[i + lane]);
    }
    return larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]));
  };
  for (int64_t row = begin; row < end; ++row) {
    const Score* row_scores = scores + row * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) {
      entries[e] = Entry(static_cast<Wide>(row_scores[e]), static_cast<uint32_t>(e));
    }
    for (int64_t group = 0; group < groups; ++group) best[group] = best_of_group(group);
    for (int64_t j = 0; j < k; ++j) {
      Entry top = best[0];
      for (int64_t group = 1; group < groups; ++group) top = larger(top, best[group]);
      const int64_t id = top.id();
      out[row * k + j] = id;
      entries[id] = Entry();
      best[id / kGroup] = best_of_group(id / kGroup);
    }
  }
}

template <typename Score>
void select(const Tensor& scores, const Tensor& out, int64_t k) {
  using Entry = std::conditional_t<std::is_same_v<Score, double>, Entry64, Entry32>;
  const int64_t num_experts = scores.size(1);
  const auto* from = static_cast<const Score*>(scores.data_ptr());
  auto* to = static_cast<int64_t*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / (num_experts + 16 * k));  // some microseconds of work
  torch::stable::parallel_for(0, scores.size(0), grain, [&](int64_t begin, int64_t end) {
    if (num_experts <= 64) {
      select_rows<Score, Entry, 8>(from, to, begin, end, num_experts, k);
    } else if (num_experts <= 512) {
      select_rows<Score, Entry, 16>(from, to, begin, end, num_experts, k);
    } else {
      select_rows<Score, Entry, 64>(from, to, begin, end, num_experts, k);
    }
  });
}

Tensor topk_indices(const Tensor& scores, int64_t k) {
  check_dim("topk_indices", "scores", scores, 2);
  const Tensor contiguous = torch::stable::contiguous(scores);
  const int64_t num_experts = scores.size(1);
  DMOE_CHECK(k >= 1 && k <= num_experts, "topk_indices: k: expected 1 to ", num_experts, " (scores has shape ",
             shape_of(scores), "), got ", k);
  DMOE_CHECK(num_experts < INT32_MAX, "topk_indices: scores: expected fewer than 2**31 experts, got ", num_experts);
  Tensor out = torch::stable::new_empty(contiguous, {scores.size(0), k}, ScalarType::Long);
  switch (scores.scalar_type()) {
    case ScalarType::Float: select<float>(contiguous, out, k); break;
    case ScalarType::Double: select<double>(contiguous, out, k); break;
    case ScalarType::BFloat16: select<torch::headeronly::BFloat16>(contiguous, out, k); break;
    case ScalarType::Half: select<torch::headeronly::Half>(contiguous, out, k); break;
    default: fail("topk_indices: scores: expected a floating-point tensor, got ", toString(scores.scalar_type()));
  }
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("topk_indices", TORCH_BOX(&dmoe::topk_indices)); }
