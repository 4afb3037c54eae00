// sort on the CPU: a threaded least-significant-digit radix sort of 8-bit digits.
//
// A first look at the keys finds the bits in which they differ at all; only digits that hold such a bit cost a pass. In a
// pass each thread counts the digits of its run, a prefix sum over (digit, run) says where each run's share of each digit
// goes, and each thread moves its run there in order: stable, and the same for any number of threads.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "dispatch.h"
#include "runs.h"

namespace dmoe {
namespace {

constexpr int kDigitBits = 8;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;
constexpr int64_t kMinRun = 8192;

// One pass: from keys and their places (null: place i is i) to keys and places ordered by `width` bits from `low` on.
template <typename Key>
void pass(const Key* keys, const int32_t* places, Key* new_keys, int32_t* new_places, int low, int width,
          const Runs& runs) {
  using Bits = std::make_unsigned_t<Key>;
  const Bits mask = static_cast<Bits>((1u << width) - 1);
  const auto digit = [low, mask](Key key) { return static_cast<size_t>((static_cast<Bits>(key) >> low) & mask); };
  std::vector<int64_t> targets(static_cast<size_t>(runs.count() * kDigits), 0);
  runs.for_each([&](int64_t run, int64_t begin, int64_t end) {
    int64_t* count = targets.data() + run * kDigits;
    for (int64_t i = begin; i < end; ++i) ++count[digit(keys[i])];
  });
  int64_t before = 0;
  for (int64_t d = 0; d < kDigits; ++d) {
    for (int64_t run = 0; run < runs.count(); ++run) {
      before += std::exchange(targets[static_cast<size_t>(run * kDigits + d)], before);
    }
  }
  runs.for_each([&](int64_t run, int64_t begin, int64_t end) {
    int64_t* const target = targets.data() + run * kDigits;
    for (int64_t i = begin; i < end; ++i) {
      const Key key = keys[i];
      const int64_t place = target[digit(key)]++;
      new_keys[place] = key;
      new_places[place] = places == nullptr ? static_cast<int32_t>(i) : places[i];
    }
  });
}

template <typename Key>
void sort_keys(const Tensor& keys_tensor, int64_t end_bit, const Tensor& sorted, const Tensor& permutation) {
  using Bits = std::make_unsigned_t<Key>;
  const Key* const keys = static_cast<const Key*>(keys_tensor.data_ptr());
  const int64_t size = keys_tensor.size(0);
  const Runs runs(size, kMinRun);

  std::vector<Bits> run_or(static_cast<size_t>(runs.count()), 0), run_and(static_cast<size_t>(runs.count()), 0);
  runs.for_each([&](int64_t run, int64_t begin, int64_t end) {
    Bits all_or = 0, all_and = static_cast<Bits>(~Bits{0});
    for (int64_t i = begin; i < end; ++i) {
      all_or |= static_cast<Bits>(keys[i]);
      all_and &= static_cast<Bits>(keys[i]);
    }
    run_or[static_cast<size_t>(run)] = all_or;
    run_and[static_cast<size_t>(run)] = all_and;
  });
  Bits all_or = 0, all_and = static_cast<Bits>(~Bits{0});
  for (const Bits bits : run_or) all_or |= bits;
  for (const Bits bits : run_and) all_and &= bits;
  if (static_cast<Key>(all_or) < 0) {
    const Key* bad = std::find_if(keys, keys + size, [](Key key) { return key < 0; });
    fail("sort: keys[", bad - keys, "]: expected at least 0, got ", static_cast<int64_t>(*bad));
  }

  const Bits differing = (all_or ^ all_and) & static_cast<Bits>((uint64_t{1} << end_bit) - 1);
  std::vector<int> shifts;
  for (int shift = 0; shift < end_bit; ++shift) {
    if (!((differing >> shift) & 1)) continue;
    shifts.push_back(shift);  // a digit begins at a bit that differs, wherever it lies
    shift += kDigitBits - 1;
  }

  Key* const out_keys = static_cast<Key*>(sorted.data_ptr());
  int32_t* const out_places = static_cast<int32_t*>(permutation.data_ptr());
  if (shifts.empty()) {
    std::copy(keys, keys + size, out_keys);
    std::iota(out_places, out_places + size, 0);
    return;
  }
  // Passes alternate between the results and a spare pair, so that the last one writes the results.
  const int64_t spare_size = shifts.size() > 1 ? size : 0;
  const Tensor spare_keys = torch::stable::new_empty(keys_tensor, {spare_size});
  const Tensor spare_places = torch::stable::new_empty(keys_tensor, {spare_size}, ScalarType::Int);
  const Key* from_keys = keys;
  const int32_t* from_places = nullptr;
  for (size_t i = 0; i < shifts.size(); ++i) {
    const bool into_results = (shifts.size() - 1 - i) % 2 == 0;
    Key* const to_keys = into_results ? out_keys : static_cast<Key*>(spare_keys.data_ptr());
    int32_t* const to_places = into_results ? out_places : static_cast<int32_t*>(spare_places.data_ptr());
    const int low = shifts[i];
    // The last digit may be narrower: bits at and above end_bit must not decide.
    const int width = static_cast<int>(std::min<int64_t>(kDigitBits, end_bit - low));
    pass(from_keys, from_places, to_keys, to_places, low, width, runs);
    from_keys = to_keys;
    from_places = to_places;
  }
}

std::tuple<Tensor, Tensor> sort(Tensor keys, int64_t end_bit) {
  check_dim("sort", "keys", keys, 1);
  DMOE_CHECK(keys.size(0) <= INT32_MAX, "sort: keys: expected fewer than 2**31, got ", keys.size(0));
  if (!keys.is_contiguous()) keys = torch::stable::contiguous(keys);
  Tensor sorted = torch::stable::new_empty(keys, keys.sizes());
  Tensor permutation = torch::stable::new_empty(keys, keys.sizes(), ScalarType::Int);
  dispatch_integer("sort", "keys", keys, [&](auto zero) {
    using Key = decltype(zero);
    constexpr int64_t kBits = 8 * sizeof(Key) - 1;
    DMOE_CHECK(end_bit >= 1 && end_bit <= kBits, "sort: end_bit: expected 1 .. ", kBits, ", got ", end_bit);
    sort_keys<Key>(keys, end_bit, sorted, permutation);
  });
  return {sorted, permutation};
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("sort", TORCH_BOX(&dmoe::sort)); }
