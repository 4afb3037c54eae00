// routing_plan on CUDA: the same stable counting sort as on the CPU, in one cooperative launch.
//
// Every warp owns a run of the visiting sequence and a private row of counters in shared memory.
//   1. Each warp counts its run; each block publishes its totals, one number for each (expert, block).
//   2. After a grid barrier, one warp an expert scans that expert's numbers over the blocks.
//   3. After a second barrier every block knows the totals, hence where every expert's rows begin, and what the blocks
//      before it contribute; each warp walks its run again and hands out rows in order.
//   4. Tiles need the experts by load. Nothing is sorted: one warp an expert counts the experts that rank before it and
//      their tiles, which is where its own go.
//
// Why not a decoupled look-back: it saves a barrier where a tile's output place depends on the tiles before it only. Here it
// depends on all of them: expert 1 begins where the last assignment of expert 0, in whichever tile, ends. So nothing can
// be written before everything is counted, which is a barrier in any case; the look-back would replace the second one
// only, and reading the numbers of all blocks E at a time costs more than a scan that is split over the grid.
//
// All blocks of a cooperative launch are resident, so the barriers cannot starve; they need no memory of ours to be zeroed;
// and such a launch can be captured in a CUDA graph. The grid asks for half of what the device can hold, so that a kernel
// on another stream (communication, say) that occupies some multiprocessors does not keep it waiting.
//
// Values are never trusted: an id outside [0, E) costs no row, and a token of `token_order` outside [0, T) is not visited.
#include <algorithm>
#include <cstdint>
#include <optional>

#include <cooperative_groups.h>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "routing_plan.h"

namespace dmoe {
namespace {

constexpr int kMaxWarps = 8;        // in a block
constexpr int kMinVisits = 128;     // of a warp: fewer do not repay its share of the scan
constexpr int kUnroll = 4;          // ids in flight in every lane
constexpr int kMaxSteps = 64;       // of a warp through the experts, when it ranks them: more repay another block
constexpr int kBlocksPerSM = 2;     // more would not shorten the counting, and lengthen the scan over blocks
constexpr unsigned kWarp = 0xffffffffu;

// Sizes fit in int32 (RoutingPlanCall checks): T*K, the number of rows and E are below 2**31.
struct PlanArguments {
  PlanOutputs out;
  const void* token_order;  // may be null
  int32_t* block_counts;    // (E, blocks): counts of each block, then their exclusive prefix over the blocks
  int32_t* totals;          // (E,)
  int32_t num_tokens, top_k, num_experts, num_rows, block_size, capacity;
  int32_t visits_per_warp;
  int32_t tile_rows, num_tiles;  // tile_rows 0: nobody asked for tiles
  bool order_is_int64, choice_major, binned;
};

struct Visit {
  int32_t expert;      // num_experts: costs no row
  int32_t assignment;  // index into token_rows; -1: nothing is visited here
  int32_t token, slot;
};

template <typename Id>
__device__ Visit visit_at(const Id* ids, const PlanArguments& a, int64_t position, int64_t end) {
  Visit visit{a.num_experts, -1, 0, 0};
  if (position >= end) return visit;
  const uint32_t p = static_cast<uint32_t>(position);
  const uint32_t inner = static_cast<uint32_t>(a.choice_major ? a.num_tokens : a.top_k);
  const uint32_t outer_index = p / inner, inner_index = p % inner;
  int64_t token = a.choice_major ? inner_index : outer_index;
  visit.slot = static_cast<int32_t>(a.choice_major ? outer_index : inner_index);
  if (a.token_order != nullptr) {
    token = a.order_is_int64 ? static_cast<const int64_t*>(a.token_order)[token]
                             : static_cast<const int32_t*>(a.token_order)[token];
    if (token < 0 || token >= a.num_tokens) return visit;
  }
  visit.token = static_cast<int32_t>(token);
  visit.assignment = visit.token * a.top_k + visit.slot;
  const int64_t id = static_cast<int64_t>(ids[visit.assignment]);
  if (id >= 0 && id < a.num_experts) visit.expert = static_cast<int32_t>(id);
  return visit;
}

// The experts' rank by load and their tiles, one warp an expert; the last in rank clears what is behind its tiles.
__device__ void cut_tiles(const PlanArguments& a, const int32_t* first_row, int64_t global_warp, int64_t warps,
                          int32_t lane) {
  int2* const tiles = reinterpret_cast<int2*>(a.out.tiles);
  const int32_t E = a.num_experts;
  const auto tiles_of = [&a](int32_t rows) { return rows / a.tile_rows + (rows % a.tile_rows != 0); };
  for (int64_t e = global_warp; e < E; e += warps) {
    const int32_t begin = first_row[e], rows = first_row[e + 1] - begin;
    int32_t rank = 0, place = 0;
    for (int32_t other = lane; other < E; other += 32) {
      const int32_t theirs = first_row[other + 1] - first_row[other];
      if (theirs > rows || (theirs == rows && other < e)) {
        ++rank;
        place += tiles_of(theirs);
      }
    }
    for (int step = 16; step > 0; step /= 2) {
      rank += __shfl_xor_sync(kWarp, rank, step);
      place += __shfl_xor_sync(kWarp, place, step);
    }
    const int32_t expert = static_cast<int32_t>(e), count = tiles_of(rows);
    if (lane == 0) a.out.experts_by_load[rank] = expert;
    for (int32_t i = lane; i < count; i += 32) tiles[place + i] = make_int2(expert, begin + i * a.tile_rows);
    if (rank == E - 1) {
      for (int64_t i = int64_t{place} + count + lane; i < a.num_tiles; i += 32) tiles[i] = make_int2(-1, -1);
    }
  }
}

template <typename Id>
__global__ void __launch_bounds__(kMaxWarps * 32) plan_kernel(const Id* ids, const PlanArguments a) {
  // (warps, E): each warp's counts, then the rank, within its expert, of the warp's next visitor; then (E,): totals, then
  // the first row of each expert.
  extern __shared__ int32_t shared[];
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int32_t E = a.num_experts;
  const int32_t warps = static_cast<int32_t>(blockDim.x / 32), warp = static_cast<int32_t>(threadIdx.x / 32);
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
  const int32_t thread = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);
  const int32_t block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  int32_t* const first_row = shared + int64_t{warps} * E;
  int32_t* const mine = shared + int64_t{warp} * E;

  const int64_t visits = int64_t{a.num_tokens} * a.top_k;
  const int64_t global_warp = int64_t{block} * warps + warp;
  const int64_t begin = min(visits, global_warp * a.visits_per_warp);
  const int64_t end = min(visits, begin + a.visits_per_warp);

  // 1. Count. Lanes with equal ids elect the lowest of them, which adds for all: no atomics, even on one hot expert.
  for (int32_t i = thread; i < warps * E; i += threads) shared[i] = 0;
  if (a.token_order != nullptr) {  // an order that is no permutation leaves gaps; they must not be read as rows
    for (int64_t i = int64_t{block} * threads + thread; i < visits; i += int64_t{blocks} * threads) {
      a.out.token_rows[i] = -1;
    }
  }
  __syncthreads();
  for (int64_t base = begin; base < end; base += 32 * kUnroll) {
    int32_t expert[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) expert[u] = visit_at(ids, a, base + 32 * u + lane, end).expert;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned peers = __match_any_sync(kWarp, expert[u]);
      if (expert[u] < E && lane == __ffs(peers) - 1) mine[expert[u]] += __popc(peers);
      __syncwarp();
    }
  }
  __syncthreads();
  for (int32_t e = thread; e < E; e += threads) {
    int32_t count = 0;
    for (int32_t w = 0; w < warps; ++w) count += shared[int64_t{w} * E + e];
    a.block_counts[int64_t{e} * blocks + block] = count;
  }
  grid.sync();

  // 2. Scan over the blocks, one warp an expert.
  for (int64_t e = global_warp; e < E; e += int64_t{blocks} * warps) {
    int32_t* const counts = a.block_counts + e * blocks;
    int32_t before = 0;
    for (int32_t base = 0; base < blocks; base += 32) {
      const int32_t b = base + lane;
      const int32_t count = b < blocks ? __ldcg(counts + b) : 0;
      int32_t sum = count;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t left = __shfl_up_sync(kWarp, sum, step);
        if (lane >= step) sum += left;
      }
      if (b < blocks) counts[b] = before + sum - count;
      before += __shfl_sync(kWarp, sum, 31);
    }
    if (lane == 0) a.totals[e] = before;
  }
  grid.sync();

  // 3. Where every expert begins, and where each warp of this block begins within each expert.
  for (int32_t e = thread; e < E; e += threads) {
    first_row[e] = __ldcg(a.totals + e);
    int32_t rank = __ldcg(a.block_counts + int64_t{e} * blocks + block);
    for (int32_t w = 0; w < warps; ++w) {
      const int32_t count = shared[int64_t{w} * E + e];
      shared[int64_t{w} * E + e] = rank;
      rank += count;
    }
  }
  __syncthreads();
  if (warp == 0) {
    int32_t before = 0;
    for (int32_t base = 0; base < E; base += 32) {
      const int32_t e = base + lane;
      const int32_t total = e < E ? first_row[e] : 0;
      const int64_t kept = min(total, a.capacity);
      const int64_t padded = a.binned ? a.capacity : (kept + a.block_size - 1) / a.block_size * a.block_size;
      const int32_t rows = e < E ? static_cast<int32_t>(padded) : 0;
      int32_t sum = rows;
      for (int step = 1; step < 32; step *= 2) {
        const int32_t left = __shfl_up_sync(kWarp, sum, step);
        if (lane >= step) sum += left;
      }
      if (e < E) {
        first_row[e] = before + sum - rows;
        if (block == 0) {
          a.out.expert_offsets[e] = before + sum - rows;
          a.out.tokens_per_expert[e] = total;
        }
      }
      before += __shfl_sync(kWarp, sum, 31);
    }
    if (lane == 0) {
      first_row[E] = before;
      if (block == 0) a.out.expert_offsets[E] = before;
    }
  }
  __syncthreads();

  // Hand out rows.
  for (int64_t base = begin; base < end; base += 32 * kUnroll) {
    Visit visit[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) visit[u] = visit_at(ids, a, base + 32 * u + lane, end);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t e = visit[u].expert;
      const unsigned peers = __match_any_sync(kWarp, e);
      const int32_t seen = e < E ? mine[e] : 0;
      __syncwarp();  // every lane has read before one of them adds
      if (e < E && lane == __ffs(peers) - 1) mine[e] = seen + __popc(peers);
      __syncwarp();
      const int32_t rank = seen + __popc(peers & ((1u << lane) - 1));
      int32_t row = -1;
      if (e < E && rank < a.capacity) {
        row = first_row[e] + rank;
        a.out.row_to_token[row] = visit[u].token;
        a.out.row_to_slot[row] = visit[u].slot;
      }
      if (visit[u].assignment >= 0) a.out.token_rows[visit[u].assignment] = row;
    }
  }

  // Holes behind each expert's rows, one block an expert; then the tail behind all of them, every thread of the grid.
  for (int32_t e = block; e < E; e += blocks) {
    const int32_t hole = first_row[e] + min(__ldcg(a.totals + e), a.capacity);
    for (int64_t row = int64_t{hole} + thread; row < first_row[e + 1]; row += threads) {
      a.out.row_to_token[row] = -1;
      a.out.row_to_slot[row] = -1;
    }
  }
  for (int64_t row = int64_t{first_row[E]} + int64_t{block} * threads + thread; row < a.num_rows;
       row += int64_t{blocks} * threads) {
    a.out.row_to_token[row] = -1;
    a.out.row_to_slot[row] = -1;
  }
  if (a.tile_rows > 0) cut_tiles(a, first_row, global_warp, int64_t{blocks} * warps, lane);
}

template <typename Id>
void launch(const RoutingPlanCall& call) {
  const Tensor& indices = call.expert_indices;
  const int64_t E = call.shape.num_experts, visits = call.shape.num_tokens * call.shape.top_k;
  const auto kernel = plan_kernel<Id>;

  // As many warps to a block as have room for their counters.
  const int64_t available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, indices);
  const auto bytes_for = [E](int64_t warps) { return ((warps + 1) * E + 1) * static_cast<int64_t>(sizeof(int32_t)); };
  int64_t warps = kMaxWarps;
  while (warps > 1 && bytes_for(warps) > available) warps /= 2;
  const int64_t shared_bytes = bytes_for(warps);
  DMOE_CHECK(shared_bytes <= available, "routing_plan: num_experts: expected at most ",
             (available / static_cast<int64_t>(sizeof(int32_t)) - 1) / 2, " on this GPU, got ", E);
  if (shared_bytes > 48 * 1024) {
    DMOE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared_bytes)));
  }
  int resident = 0;
  DMOE_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, static_cast<int>(32 * warps),
                                                               static_cast<size_t>(shared_bytes)));
  const int64_t per_sm = std::clamp<int64_t>(resident / 2, 1, kBlocksPerSM);
  const int64_t most = per_sm * device_attribute(cudaDevAttrMultiProcessorCount, indices);
  int64_t wanted = (visits + warps * kMinVisits - 1) / (warps * kMinVisits);
  if (call.shape.tile_rows > 0) wanted = std::max(wanted, E * E / (32 * kMaxSteps * warps));
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, most);
  // Whole groups of 32 consecutive visits, so that loads of one group share cache lines.
  const int64_t share = (visits + blocks * warps - 1) / (blocks * warps);

  const Tensor scratch = workspace(indices, (E * blocks + E) * static_cast<int64_t>(sizeof(int32_t)));
  int32_t* const counts = static_cast<int32_t*>(scratch.data_ptr());
  PlanArguments arguments{};
  arguments.out = call.outputs();
  arguments.token_order = call.token_order.has_value() ? call.token_order->data_ptr() : nullptr;
  arguments.order_is_int64 = call.token_order.has_value() && call.token_order->scalar_type() == ScalarType::Long;
  arguments.block_counts = counts;
  arguments.totals = counts + E * blocks;
  arguments.num_tokens = static_cast<int32_t>(call.shape.num_tokens);
  arguments.top_k = static_cast<int32_t>(call.shape.top_k);
  arguments.num_experts = static_cast<int32_t>(E);
  arguments.num_rows = static_cast<int32_t>(call.shape.num_rows);
  arguments.block_size = static_cast<int32_t>(call.shape.block_size);
  arguments.capacity = static_cast<int32_t>(call.shape.capacity);
  arguments.visits_per_warp = static_cast<int32_t>((share + 31) / 32 * 32);
  arguments.tile_rows = static_cast<int32_t>(call.shape.tile_rows);
  arguments.num_tiles = static_cast<int32_t>(call.shape.num_tiles);
  arguments.choice_major = call.shape.choice_major;
  arguments.binned = call.shape.binned;

  const Id* ids = static_cast<const Id*>(indices.data_ptr());
  void* parameters[] = {&ids, &arguments};
  DMOE_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                             dim3(static_cast<unsigned>(32 * warps)), parameters,
                                             static_cast<size_t>(shared_bytes), current_stream(indices)));
}

PlanResults routing_plan(Tensor expert_indices, int64_t num_experts, int64_t block_size, std::optional<int64_t> capacity,
                         bool choice_major, std::optional<Tensor> token_order, bool binned, int64_t tile_rows) {
  const DeviceGuard guard(expert_indices);
  const RoutingPlanCall call(expert_indices, num_experts, block_size, capacity, choice_major, token_order, binned,
                             tile_rows);
  if (expert_indices.scalar_type() == ScalarType::Int) {
    launch<int32_t>(call);
  } else {
    launch<int64_t>(call);
  }
  return call.results();
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) { m.impl("routing_plan", TORCH_BOX(&dmoe::routing_plan)); }
