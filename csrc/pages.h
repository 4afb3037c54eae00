// Large results of an operation are fresh pages: touching them 4 KiB at a time can cost as much as computing them.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dmoe {

// Only a hint: where it is refused, everything works as before.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kWorthwhile = uintptr_t{1} << 23;
  const uintptr_t size = static_cast<uintptr_t>(bytes);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) / kPage * kPage;
  if (size >= kWorthwhile) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised tensors of the CPU that are about to be written as a whole.
inline torch::stable::Tensor in_huge_pages(torch::stable::Tensor out) {
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}
inline torch::stable::Tensor large_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes) {
  return in_huge_pages(torch::stable::new_empty(like, sizes));
}
inline torch::stable::Tensor large_empty_like(const torch::stable::Tensor& tensor) {
  return in_huge_pages(torch::stable::empty_like(tensor));
}

}  // namespace dmoe
