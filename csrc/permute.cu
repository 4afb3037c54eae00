// permute on CUDA: a block per row copies it in the widest words that its alignment allows.
#include <climits>
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "cuda_common.cuh"

namespace dmoe {
namespace {

// One row a block: its token is loaded once, and 128 threads move 2 KiB a step. A token out of range counts as -1.
template <typename Word>
__global__ void __launch_bounds__(128)
    permute_kernel(const Word* __restrict__ x, const int32_t* __restrict__ row_to_token, Word* __restrict__ out,
                   int64_t tokens, int64_t row_words) {
  const int64_t row = blockIdx.x;
  const int64_t token = row_to_token[row];
  const bool present = token >= 0 && token < tokens;
  const Word* from = x + (present ? token : 0) * row_words;
  Word* to = out + row * row_words;
  for (int64_t i = threadIdx.x; i < row_words; i += 128) to[i] = present ? from[i] : Word{};
}

template <typename Word>
void launch(const Tensor& x, const Tensor& row_to_token, const Tensor& out, int64_t row_bytes) {
  permute_kernel<Word><<<static_cast<unsigned>(out.size(0)), 128, 0, current_stream(x)>>>(
      static_cast<const Word*>(x.data_ptr()), static_cast<const int32_t*>(row_to_token.data_ptr()),
      static_cast<Word*>(out.data_ptr()), x.size(0), row_bytes / static_cast<int64_t>(sizeof(Word)));
  DMOE_CUDA_CHECK(cudaGetLastError());
}

Tensor permute(const Tensor& x, const Tensor& row_to_token, const Tensor& token_offsets, const Tensor& token_rows) {
  check_dim("permute", "x", x, 2);
  check_dim("permute", "row_to_token", row_to_token, 1);
  check_dtype("permute", "row_to_token", row_to_token, ScalarType::Int);
  DeviceGuard guard(x);
  const Tensor source = torch::stable::contiguous(x);
  const Tensor index = torch::stable::contiguous(row_to_token);
  const int64_t rows = row_to_token.size(0);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor out = torch::stable::new_empty(source, {rows, x.size(1)});
  if (rows == 0 || row_bytes == 0) return out;
  DMOE_CHECK(rows <= INT_MAX, "permute: row_to_token: expected fewer than 2**31 rows, got ", rows);

  // `out` is fresh from the allocator; `x` may be a view that starts anywhere.
  const auto alignment = static_cast<uint64_t>(row_bytes) | reinterpret_cast<uintptr_t>(source.data_ptr());
  if (alignment % 16 == 0) {
    launch<uint4>(source, index, out, row_bytes);
  } else if (alignment % 8 == 0) {
    launch<uint2>(source, index, out, row_bytes);
  } else if (alignment % 4 == 0) {
    launch<uint32_t>(source, index, out, row_bytes);
  } else if (alignment % 2 == 0) {
    launch<uint16_t>(source, index, out, row_bytes);
  } else {
    launch<uint8_t>(source, index, out, row_bytes);
  }
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) { m.impl("permute", TORCH_BOX(&dmoe::permute)); }
