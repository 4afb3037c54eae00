// The k largest scores of a row, by a two-level tournament without branches on the data.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace dmoe {

// An entry orders first by score, then the lower id first, as one unsigned comparison. Every entry is above kTaken.
//
// The key of a score: its bits, read as sign and magnitude, mapped to unsigned integers in the same order; -0 equals +0
// and every NaN is the largest key.
inline uint32_t key_of(float score) {
  if (score != score) return UINT32_MAX;
  const float no_negative_zero = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &no_negative_zero, sizeof bits);
  return bits ^ (bits >> 31 ? UINT32_MAX : UINT32_C(1) << 31);
}

inline uint64_t key_of(double score) {
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
template <typename Score>
class TopKRows {
  using Entry = std::conditional_t<std::is_same_v<Score, double>, Entry64, Entry32>;
  using Wide = std::conditional_t<std::is_same_v<Score, double>, double, float>;

 public:
  TopKRows(int64_t num_experts, int64_t k)
      : num_experts_(num_experts), k_(k), group_(num_experts <= 64 ? 8 : num_experts <= 512 ? 16 : 64),
        groups_((num_experts + group_ - 1) / group_),
        entries_(groups_ * group_), best_(groups_) {}  // what lies beyond num_experts stays below every entry

  // Ids of the k largest, best first; ties take the lowest id, and NaN is the largest number.
  template <typename Id>
  void select(const Score* scores, Id* out) {
    switch (group_) {
      case 8: return select_by<8>(scores, out);
      case 16: return select_by<16>(scores, out);
      default: return select_by<64>(scores, out);
    }
  }

 private:
  template <int kGroup, typename Id>
  void select_by(const Score* scores, Id* out) {
    for (int64_t e = 0; e < num_experts_; ++e) {
      entries_[e] = Entry(static_cast<Wide>(scores[e]), static_cast<uint32_t>(e));
    }
    for (int64_t group = 0; group < groups_; ++group) best_[group] = best_of<kGroup>(group);
    for (int64_t j = 0; j < k_; ++j) {
      Entry top = best_[0];
      for (int64_t group = 1; group < groups_; ++group) top = larger(top, best_[group]);
      const int64_t id = top.id();
      out[j] = static_cast<Id>(id);
      entries_[id] = Entry();
      best_[id / kGroup] = best_of<kGroup>(id / kGroup);
    }
  }
  template <int kGroup>
  Entry best_of(int64_t group) const {
    const Entry* first = entries_.data() + group * kGroup;
    Entry lanes[4] = {first[0], first[1], first[2], first[3]};  // four chains of comparisons, to overlap their latency
    for (int i = 4; i < kGroup; i += 4) {
      for (int lane = 0; lane < 4; ++lane) lanes[lane] = larger(lanes[lane], first[i + lane]);
    }
    return larger(larger(lanes[0], lanes[1]), larger(lanes[2], lanes[3]));
  }

  int64_t num_experts_, k_;
  int group_;
  int64_t groups_;
  std::vector<Entry> entries_, best_;
};

}  // namespace dmoe
