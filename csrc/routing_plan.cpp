// routing_plan on the CPU: a stable counting sort of the assignments by expert, in two passes over the ids.
//
// The visiting sequence is cut into one run per thread. Pass 1 counts each run's ids; a prefix sum over (expert, run)
// gives every run its first row in every expert; pass 2 walks the same runs again and hands out rows. Rows depend on the
// visiting order alone, so the result is the same for any number of threads.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "pages.h"
#include "routing_plan.h"
#include "runs.h"

namespace dmoe {
namespace {

constexpr int64_t kMinRun = 8192;  // visits that repay waking a thread

// When rows are written a cache line at a time: more results than the caches hold, more experts than they can follow, and
// not so many that the lines themselves would not fit. Measured.
constexpr int64_t kMinVisitsForLines = int64_t{1} << 19, kMinExpertsForLines = 32, kMaxExpertsForLines = 4096;

// Token after token. A type of its own, so that the common case reads the ids where they are.
struct Identity {
  int64_t operator()(int64_t i) const { return i; }
};

// What a run visits: positions [begin, end) of the visiting sequence, as (index of the assignment, token, slot).
template <bool kChoiceMajor, typename Order, typename Visit>
inline void for_each_visit(int64_t begin, int64_t end, int64_t T, int64_t K, Order order, Visit visit) {
  if (begin >= end) return;  // T may be 0
  const int64_t inner = kChoiceMajor ? T : K;
  int64_t outer = begin / inner;
  int64_t first = begin % inner;
  for (int64_t position = begin; position < end; ++outer) {
    const int64_t last = std::min(inner, first + end - position);
    if constexpr (kChoiceMajor) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t token = order(i);
        visit(token * K + outer, token, outer);
      }
    } else {
      const int64_t token = order(outer);
      for (int64_t slot = first; slot < last; ++slot) visit(token * K + slot, token, slot);
    }
    position += last - first;
    first = 0;
  }
}

// Adds the ids at visits [begin, end) to `count`, four rows of `stride` counters; false when one lies outside [0, E].
//
// The four rows are used in turn: equal ids in a row then do not wait for each other's store. Blocks small enough for the
// innermost cache are checked first, in a loop that the compiler turns into vector instructions, so that the loop that
// counts carries no check.
template <typename Id, bool kChoiceMajor, typename Order>
bool count_run(const Id* ids, int64_t begin, int64_t end, const PlanShape& shape, const Order& order, int64_t stride,
               int32_t* count) {
  using Bits = std::make_unsigned_t<Id>;
  constexpr int64_t kBlock = 1024;
  Id gathered[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t size = std::min(kBlock, end - from);
    const Id* block = ids + from;
    if constexpr (kChoiceMajor || !std::is_same_v<Order, Identity>) {
      Id* next = gathered;
      for_each_visit<kChoiceMajor>(from, from + size, shape.num_tokens, shape.top_k, order,
                                   [&](int64_t i, int64_t, int64_t) { *next++ = ids[i]; });
      block = gathered;
    }
    Bits signs = 0;  // the top bit of `id` is set when id < 0, that of `E - id` when id > E
    for (int64_t i = 0; i < size; ++i) {
      signs |= static_cast<Bits>(block[i]) | (static_cast<Bits>(shape.num_experts) - static_cast<Bits>(block[i]));
    }
    if (signs >> (8 * sizeof(Id) - 1)) return false;
    int64_t i = 0;
    for (; i + 4 <= size; i += 4) {
      for (int64_t lane = 0; lane < 4; ++lane) ++count[lane * stride + block[i + lane]];
    }
    for (; i < size; ++i) ++count[block[i]];
  }
  return true;
}

// Hands out rows for visits [begin, end): cursor[e] is the next row of expert e, limit[e] the end of its kept rows.
template <typename Id, bool kChoiceMajor, typename Order>
void scatter_run(const Id* ids, int64_t begin, int64_t end, const PlanShape& shape, const Order& order, int64_t* cursor,
                 const int64_t* limit, const PlanOutputs& out) {
  // By value: were these read through references, every store below might change them, and each would be reloaded.
  for_each_visit<kChoiceMajor>(begin, end, shape.num_tokens, shape.top_k, order,
                               [cursor, limit, ids, out](int64_t i, int64_t token, int64_t slot) {
                                 const int64_t e = static_cast<int64_t>(ids[i]);
                                 const int64_t row = cursor[e]++;
                                 if (row < limit[e]) {
                                   out.row_to_token[row] = static_cast<int32_t>(token);
                                   out.row_to_slot[row] = static_cast<int32_t>(slot);
                                   out.token_rows[i] = static_cast<int32_t>(row);
                                 } else {
                                   out.token_rows[i] = -1;
                                 }
                               });
}

// The rows of one expert that share a cache line of the results, collected before they are written.
constexpr int64_t kLine = 16;
struct alignas(64) Line {
  int32_t token[kLine], slot[kLine];
};

// Writes rows [begin, end) of one line. A full line goes past the caches: nothing here reads it again.
inline void write_line(const int32_t* line, int64_t begin, int64_t end, int32_t* out) {
#ifdef __SSE2__
  if (end - begin == kLine && reinterpret_cast<uintptr_t>(out + begin) % 16 == 0) {
    for (int64_t i = 0; i < kLine; i += 4) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + begin + i),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(line + i)));
    }
    return;
  }
#endif
  std::copy(line + begin % kLine, line + begin % kLine + (end - begin), out + begin);
}

// The same as scatter_run, for results that exceed the caches: each expert's rows are a stream of single writes, and more
// streams than the caches can follow cost a trip to memory for each write. Lines make it one trip for sixteen.
template <typename Id, bool kChoiceMajor, typename Order>
void scatter_run_through_lines(const Id* ids, int64_t begin, int64_t end, const PlanShape& shape, const Order& order,
                               int64_t* cursor, const int64_t* limit, const PlanOutputs& out) {
  const int64_t E = shape.num_experts;
  std::vector<Line> lines(static_cast<size_t>(E));
  const std::vector<int64_t> starts(cursor, cursor + E);  // rows before them belong to other runs
  const auto write = [&starts, out](int64_t e, const Line& line, int64_t last) {  // the line of row last - 1, up to it
    const int64_t first = std::max(starts[static_cast<size_t>(e)], (last - 1) / kLine * kLine);
    write_line(line.token, first, last, out.row_to_token);
    write_line(line.slot, first, last, out.row_to_slot);
  };
  Line* const line_of = lines.data();
  for_each_visit<kChoiceMajor>(begin, end, shape.num_tokens, shape.top_k, order,
                               [cursor, limit, ids, out, line_of, &write](int64_t i, int64_t token, int64_t slot) {
                                 const int64_t e = static_cast<int64_t>(ids[i]);
                                 const int64_t row = cursor[e]++;
                                 if (row < limit[e]) {
                                   Line& line = line_of[e];
                                   line.token[row % kLine] = static_cast<int32_t>(token);
                                   line.slot[row % kLine] = static_cast<int32_t>(slot);
                                   out.token_rows[i] = static_cast<int32_t>(row);
                                   if (row % kLine == kLine - 1) write(e, line, row + 1);
                                 } else {
                                   out.token_rows[i] = -1;
                                 }
                               });
  for (int64_t e = 0; e < E; ++e) {
    const int64_t last = std::min(cursor[e], limit[e]);
    if (last > starts[static_cast<size_t>(e)] && last % kLine != 0) write(e, lines[static_cast<size_t>(e)], last);
  }
#ifdef __SSE2__
  _mm_sfence();  // writes past the caches are ordered before whatever follows
#endif
}

// Tiles of `tile_rows` rows, the experts with most rows first; -1 behind the last one.
void cut_tiles(const PlanShape& shape, const PlanOutputs& out) {
  const int64_t E = shape.num_experts;
  const auto rows = [&out](int32_t e) { return int64_t{out.expert_offsets[e + 1]} - out.expert_offsets[e]; };
  std::iota(out.experts_by_load, out.experts_by_load + E, 0);
  std::stable_sort(out.experts_by_load, out.experts_by_load + E, [&](int32_t a, int32_t b) { return rows(a) > rows(b); });
  int32_t* next = out.tiles;
  for (int64_t i = 0; i < E; ++i) {
    const int32_t e = out.experts_by_load[i];
    for (int64_t row = out.expert_offsets[e]; row < out.expert_offsets[e + 1]; row += shape.tile_rows) {
      *next++ = e;
      *next++ = static_cast<int32_t>(row);
    }
  }
  std::fill(next, out.tiles + 2 * shape.num_tiles, -1);
}

template <typename Id, bool kChoiceMajor, typename Order>
bool plan_runs(const Id* ids, const PlanShape& shape, const Order& order, const PlanOutputs& out) {
  const int64_t E = shape.num_experts, T = shape.num_tokens, K = shape.top_k, visits = T * K;
  const Runs cut(visits, kMinRun);
  const int64_t runs = cut.count();

  const int64_t stride = (E + 1 + 15) / 16 * 16;  // runs do not share cache lines
  std::vector<int32_t> counts(static_cast<size_t>(runs * 4 * stride), 0);
  std::vector<int64_t> cursors(static_cast<size_t>(runs * stride));
  std::vector<uint8_t> run_is_bad(static_cast<size_t>(runs), 0);

  cut.for_each([&](int64_t run, int64_t begin, int64_t end) {
    int32_t* count = counts.data() + run * 4 * stride;
    run_is_bad[static_cast<size_t>(run)] = !count_run<Id, kChoiceMajor>(ids, begin, end, shape, order, stride, count);
    int64_t* total = cursors.data() + run * stride;
    for (int64_t e = 0; e <= E; ++e) {
      total[e] = int64_t{count[e]} + count[stride + e] + count[2 * stride + e] + count[3 * stride + e];
    }
  });
  if (std::any_of(run_is_bad.begin(), run_is_bad.end(), [](uint8_t bad) { return bad != 0; })) return false;

  prefer_huge_pages(out.row_to_token, shape.num_rows * static_cast<int64_t>(sizeof(int32_t)));
  prefer_huge_pages(out.row_to_slot, shape.num_rows * static_cast<int64_t>(sizeof(int32_t)));
  prefer_huge_pages(out.token_rows, visits * static_cast<int64_t>(sizeof(int32_t)));

  // Where every expert's rows begin, and where each run's share of them begins.
  std::vector<int64_t> limits(static_cast<size_t>(E + 1), 0);  // end of the kept rows; of id E nothing is kept
  int64_t offset = 0, kept_rows = 0;
  for (int64_t e = 0; e < E; ++e) {
    int64_t total = 0;
    for (int64_t run = 0; run < runs; ++run) {
      int64_t& cursor = cursors[static_cast<size_t>(run * stride + e)];
      const int64_t count = cursor;
      cursor = offset + total;
      total += count;
    }
    const int64_t kept = std::min(total, shape.capacity);
    out.tokens_per_expert[e] = static_cast<int32_t>(total);
    out.expert_offsets[e] = static_cast<int32_t>(offset);
    limits[static_cast<size_t>(e)] = offset + kept;
    kept_rows += kept;
    offset += shape.binned ? shape.capacity : (kept + shape.block_size - 1) / shape.block_size * shape.block_size;
  }
  out.expert_offsets[E] = static_cast<int32_t>(offset);
  if (shape.tile_rows > 0) cut_tiles(shape, out);

  const bool through_lines = visits >= kMinVisitsForLines && E >= kMinExpertsForLines && E <= kMaxExpertsForLines;
  cut.for_each([&](int64_t run, int64_t begin, int64_t end) {
    int64_t* const cursor = cursors.data() + run * stride;
    cursor[E] = 0;
    if (through_lines) {
      scatter_run_through_lines<Id, kChoiceMajor>(ids, begin, end, shape, order, cursor, limits.data(), out);
    } else {
      scatter_run<Id, kChoiceMajor>(ids, begin, end, shape, order, cursor, limits.data(), out);
    }
  });

  // Holes behind each expert's rows; as "expert E", the tail behind all of them. Few holes do not repay waking threads.
  const int64_t grain = shape.num_rows - kept_rows < 4 * kMinRun ? E + 1 : 64;
  torch::stable::parallel_for(0, E + 1, grain, [&](int64_t from, int64_t to) {
    for (int64_t e = from; e < to; ++e) {
      const int64_t begin = e < E ? limits[static_cast<size_t>(e)] : offset;
      const int64_t end = e < E ? out.expert_offsets[e + 1] : shape.num_rows;
      std::fill(out.row_to_token + begin, out.row_to_token + end, -1);
      std::fill(out.row_to_slot + begin, out.row_to_slot + end, -1);
    }
  });
  return true;
}

template <typename Id, typename Order>
void plan_in_order(const Id* ids, const PlanShape& shape, const Order& order, const PlanOutputs& out) {
  const bool good = shape.choice_major ? plan_runs<Id, true>(ids, shape, order, out)
                                       : plan_runs<Id, false>(ids, shape, order, out);
  if (good) return;
  const int64_t E = shape.num_experts, K = shape.top_k;
  const Id* bad = std::find_if(ids, ids + shape.num_tokens * K,
                               [&](Id id) { return id < 0 || static_cast<int64_t>(id) > E; });
  const int64_t position = bad - ids;
  fail("routing_plan: expert_indices[", position / K, ", ", position % K, "]: expected an id in [0, ", E, "] (", E,
       " means dropped), got ", static_cast<int64_t>(*bad));
}

// A repeated or missing token would leave entries of the result unwritten.
template <typename Token>
void check_permutation(const Token* order, int64_t T) {
  std::vector<bool> seen(static_cast<size_t>(T), false);
  for (int64_t i = 0; i < T; ++i) {
    const int64_t token = static_cast<int64_t>(order[i]);
    const bool fits = token >= 0 && token < T && !seen[static_cast<size_t>(token)];
    DMOE_CHECK(fits, "routing_plan: token_order: expected a permutation of range(", T, "), got ", token, " at position ",
               i, token >= 0 && token < T ? " a second time" : "");
    seen[static_cast<size_t>(token)] = true;
  }
}

template <typename Id>
void plan_ids(const Tensor& expert_indices, const std::optional<Tensor>& token_order, const PlanShape& shape,
              const PlanOutputs& out) {
  const Id* ids = static_cast<const Id*>(expert_indices.data_ptr());
  if (!token_order.has_value()) {
    plan_in_order(ids, shape, Identity{}, out);
  } else if (token_order->scalar_type() == ScalarType::Int) {
    const int32_t* order = static_cast<const int32_t*>(token_order->data_ptr());
    check_permutation(order, shape.num_tokens);
    plan_in_order(ids, shape, [order](int64_t i) { return static_cast<int64_t>(order[i]); }, out);
  } else {
    const int64_t* order = static_cast<const int64_t*>(token_order->data_ptr());
    check_permutation(order, shape.num_tokens);
    plan_in_order(ids, shape, [order](int64_t i) { return order[i]; }, out);
  }
}

}  // namespace

void make_plan(const RoutingPlanCall& call) {
  if (call.expert_indices.scalar_type() == ScalarType::Int) {
    plan_ids<int32_t>(call.expert_indices, call.token_order, call.shape, call.outputs());
  } else {
    plan_ids<int64_t>(call.expert_indices, call.token_order, call.shape, call.outputs());
  }
}

namespace {

PlanResults routing_plan(Tensor expert_indices, int64_t num_experts, int64_t block_size, std::optional<int64_t> capacity,
                         bool choice_major, std::optional<Tensor> token_order, bool binned, int64_t tile_rows) {
  RoutingPlanCall call(expert_indices, num_experts, block_size, capacity, choice_major, token_order, binned, tile_rows);
  make_plan(call);
  return call.results();
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) { m.impl("routing_plan", TORCH_BOX(&dmoe::routing_plan)); }
