// topk_indices on CUDA: one warp per row, k rounds of a warp-wide maximum.
//
// Every round reads the row again, from L1 after the first: E is at most some hundreds and k small, so the kernel is
// bound by launch and latency, and it needs neither shared memory nor a limit on E. No id is marked as taken: the next
// one is the largest that ranks below the previous one, and ranks are distinct because the id breaks every tie.
#include <climits>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"

namespace dmoe {
namespace {

constexpr int kWarpsPerBlock = 4;

__device__ float widen(float score) { return score; }
__device__ double widen(double score) { return score; }
__device__ float widen(__nv_bfloat16 score) { return __bfloat162float(score); }
__device__ float widen(__half score) { return __half2float(score); }

// Integers in the order of the scores: -0 equals +0, every NaN is the largest.
__device__ int32_t key_of(float score) {
  if (score != score) return INT32_MAX;
  const int32_t bits = __float_as_int(score == 0.0f ? 0.0f : score);
  return bits ^ ((bits >> 31) & INT32_MAX);
}
__device__ int64_t key_of(double score) {
  if (score != score) return INT64_MAX;
  const int64_t bits = __double_as_longlong(score == 0.0 ? 0.0 : score);
  return bits ^ ((bits >> 63) & INT64_MAX);
}

template <typename Key>
__device__ bool ranks_above(Key key, int id, Key other_key, int other_id) {
  return key > other_key || (key == other_key && id < other_id);
}

template <typename Score>
__global__ void __launch_bounds__(kWarpsPerBlock * 32)
    topk_kernel(const Score* __restrict__ scores, int64_t* __restrict__ out, int64_t rows, int num_experts, int k) {
  using Key = decltype(key_of(widen(Score())));
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp at a time
  scores += row * num_experts;
  out += row * k;

  Key last_key = 0;
  int last_id = -1;
  for (int j = 0; j < k; ++j) {
    Key best_key = 0;
    int best_id = INT_MAX;  // "none": only other lanes have candidates left
    for (int e = lane; e < num_experts; e += 32) {
      const Key key = key_of(widen(scores[e]));
      const bool left = last_id < 0 || ranks_above(last_key, last_id, key, e);
      if (left && (best_id == INT_MAX || ranks_above(key, e, best_key, best_id))) {
        best_key = key;
        best_id = e;
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const Key other_key = __shfl_xor_sync(0xffffffffu, best_key, offset);
      const int other_id = __shfl_xor_sync(0xffffffffu, best_id, offset);
      if (other_id != INT_MAX && (best_id == INT_MAX || ranks_above(other_key, other_id, best_key, best_id))) {
        best_key = other_key;
        best_id = other_id;
      }
    }
    last_key = best_key;
    last_id = best_id;
    if (lane == 0) out[j] = best_id;
  }
}

template <typename Score>
void launch(const Tensor& scores, const Tensor& out, int64_t k) {
  const int64_t rows = scores.size(0);
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  topk_kernel<<<static_cast<unsigned>(blocks), kWarpsPerBlock * 32, 0, current_stream(scores)>>>(
      static_cast<const Score*>(scores.data_ptr()), static_cast<int64_t*>(out.data_ptr()), rows,
      static_cast<int>(scores.size(1)), static_cast<int>(k));
  DMOE_CUDA_CHECK(cudaGetLastError());
}

Tensor topk_indices(const Tensor& scores, int64_t k) {
  check_dim("topk_indices", "scores", scores, 2);
  const int64_t num_experts = scores.size(1);
  DMOE_CHECK(k >= 1 && k <= num_experts, "topk_indices: k: expected 1 to ", num_experts, " (scores has shape ",
             shape_of(scores), "), got ", k);
  DMOE_CHECK(num_experts < INT_MAX, "topk_indices: scores: expected fewer than 2**31 experts, got ", num_experts);
  DMOE_CHECK(scores.size(0) / kWarpsPerBlock < INT_MAX, "topk_indices: scores: too many rows: ", scores.size(0));
  DeviceGuard guard(scores);
  const Tensor contiguous = torch::stable::contiguous(scores);
  Tensor out = torch::stable::new_empty(contiguous, {scores.size(0), k}, ScalarType::Long);
  if (scores.size(0) == 0) return out;
  switch (scores.scalar_type()) {
    case ScalarType::Float: launch<float>(contiguous, out, k); break;
    case ScalarType::Double: launch<double>(contiguous, out, k); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16>(contiguous, out, k); break;
    case ScalarType::Half: launch<__half>(contiguous, out, k); break;
    default: fail("topk_indices: scores: expected a floating-point tensor, got ", toString(scores.scalar_type()));
  }
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) { m.impl("topk_indices", TORCH_BOX(&dmoe::topk_indices)); }
