// sort on CUDA: CUB's radix sort, which is stable, with the index of each key as its value.
#include <cstdint>
#include <tuple>
#include <type_traits>

#include <cub/device/device_radix_sort.cuh>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"
#include "dispatch.h"

namespace dmoe {
namespace {

__global__ void __launch_bounds__(256) count_up_kernel(int32_t* out, int64_t size) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < size; i += int64_t{gridDim.x} * 256) {
    out[i] = static_cast<int32_t>(i);
  }
}

template <typename Key>
void sort_keys(const Tensor& keys, int64_t end_bit, const Tensor& sorted, const Tensor& permutation) {
  using Bits = std::make_unsigned_t<Key>;  // the sign bit is never looked at
  const cudaStream_t stream = current_stream(keys);
  const int32_t size = static_cast<int32_t>(keys.size(0));
  const Tensor places = torch::stable::new_empty(keys, {size}, ScalarType::Int);
  int32_t* const place = static_cast<int32_t*>(places.data_ptr());
  count_up_kernel<<<grid_for(size, 256, keys), 256, 0, stream>>>(place, size);
  DMOE_CUDA_CHECK(cudaGetLastError());

  const Bits* const from = static_cast<const Bits*>(keys.data_ptr());
  Bits* const to = static_cast<Bits*>(sorted.data_ptr());
  int32_t* const to_place = static_cast<int32_t*>(permutation.data_ptr());
  size_t bytes = 0;
  const auto run = [&](void* scratch) {
    return cub::DeviceRadixSort::SortPairs(scratch, bytes, from, to, static_cast<const int32_t*>(place), to_place, size, 0,
                                           static_cast<int>(end_bit), stream);
  };
  DMOE_CUDA_CHECK(run(nullptr));
  const Tensor scratch = workspace(keys, static_cast<int64_t>(bytes));
  DMOE_CUDA_CHECK(run(scratch.data_ptr()));
}

std::tuple<Tensor, Tensor> sort(Tensor keys, int64_t end_bit) {
  const DeviceGuard guard(keys);
  check_dim("sort", "keys", keys, 1);
  DMOE_CHECK(keys.size(0) <= INT32_MAX, "sort: keys: expected fewer than 2**31, got ", keys.size(0));
  if (!keys.is_contiguous()) keys = torch::stable::contiguous(keys);
  Tensor sorted = torch::stable::new_empty(keys, keys.sizes());
  Tensor permutation = torch::stable::new_empty(keys, keys.sizes(), ScalarType::Int);
  if (keys.size(0) == 0) return {sorted, permutation};
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

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) { m.impl("sort", TORCH_BOX(&dmoe::sort)); }
