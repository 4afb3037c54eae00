// What every CUDA source needs: torch's current stream, the right device, checked runtime calls, workspace.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace dmoe {

#define DMOE_CUDA_CHECK(expr)                                                                                     \
  do {                                                                                                            \
    const cudaError_t dmoe_status = (expr);                                                                       \
    DMOE_CHECK(dmoe_status == cudaSuccess, __FILE__, ":", __LINE__, ": ", #expr, ": ", cudaGetErrorName(dmoe_status), \
               ": ", cudaGetErrorString(dmoe_status));                                                            \
  } while (0)

// Makes the tensor's device current until the end of the scope. torch's own guard, not cudaSetDevice: restoring a
// device that was never used would otherwise create a context on it.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch has made current for the tensor's device.
//
// The function that knows it lives in libtorch_cuda, which this library does not link: one build serves torch with and
// without CUDA. It is looked up once, at the first CUDA call; torch has loaded libtorch_cuda by then, since a CUDA tensor
// exists. A plain lookup may miss it, because Python loads torch's libraries with RTLD_LOCAL.
inline cudaStream_t current_stream(const Tensor& tensor) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (symbol == nullptr) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, kName);
    }
    DMOE_CHECK(symbol != nullptr, "cuda: ", kName, " was not found in this process: expected libtorch_cuda to be loaded");
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  const int32_t status = getter(tensor.get_device_index(), &stream);
  DMOE_CHECK(status == 0, "cuda: torch returned no current stream for device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

// Uninitialised scratch memory from torch's allocator, alive as long as the tensor is: safe in a CUDA graph, and safe to
// release right after the launch, because the allocator orders reuse on the same stream.
inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

inline int device_attribute(cudaDeviceAttr attribute, const Tensor& tensor) {
  int value = 0;
  DMOE_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

// Blocks for `count` independent elements, for kernels that walk them with a grid-sized stride.
inline unsigned grid_for(int64_t count, int64_t per_block, const Tensor& tensor) {
  const int64_t wanted = (count + per_block - 1) / per_block;
  const int64_t enough = int64_t{16} * device_attribute(cudaDevAttrMultiProcessorCount, tensor);
  return static_cast<unsigned>(wanted < 1 ? 1 : (wanted < enough ? wanted : enough));
}

}  // namespace dmoe
