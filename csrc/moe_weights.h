// Where the weights of all experts lie: read, and their gradients written, in whatever layout they are held.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace dmoe {

using torch::stable::Tensor;

// One projection. Element (f, h) of expert e is at data + at(e, start) + f * f_stride + h * h_stride, `start` being the
// expert's first column among packed ones.
template <typename T>
struct Weight {
  T* data = nullptr;
  int64_t expert_stride = 0, packed_stride = 0, f_stride = 0, h_stride = 0;

  Weight() = default;
  // `f_dim` and `h_dim` count from the end. Where `packed`, experts stand side by side along F.
  Weight(const Tensor& tensor, bool packed, int64_t f_dim, int64_t h_dim)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))),
        expert_stride(packed ? 0 : stride_of(tensor, -tensor.dim())),
        packed_stride(packed ? stride_of(tensor, f_dim) : 0),
        f_stride(stride_of(tensor, f_dim)),
        h_stride(stride_of(tensor, h_dim)) {}

  int64_t at(int64_t expert, int64_t start) const { return expert * expert_stride + start * packed_stride; }

  // A contiguous tensor may have any stride along a dimension of one element, which would hide from a product that its
  // rows are dense.
  static int64_t stride_of(const Tensor& tensor, int64_t dim) {
    if (!tensor.is_contiguous()) return tensor.stride(tensor.dim() + dim);
    int64_t stride = 1;
    for (int64_t d = dim + 1; d < 0; ++d) stride *= tensor.size(tensor.dim() + d);
    return stride;
  }
};

// All projections, or their gradients. The gate's half of up comes first; where both halves are one matrix of 2 F rows,
// as in contiguous weights of experts of one width, that is up[0]. So it is where their rows take turns (gate 0, up 0,
// gate 1 ...), in this order.
template <typename T>
struct Weights {
  Weight<T> up[2], down;
  bool halves_are_one = false, interleaved = false;

  Weights() = default;
  Weights(bool gated, bool packed, const Tensor& up_proj, const std::optional<Tensor>& gate_proj,
          const Tensor& down_proj)
      : down(down_proj, packed, -1, -2) {
    up[0] = Weight<T>(gate_proj ? *gate_proj : up_proj, packed, -2, -1);
    if (!gated) return;
    up[1] = Weight<T>(up_proj, packed, -2, -1);
    if (gate_proj) return;
    const int64_t half = Weight<T>::stride_of(up_proj, -3);
    up[1].data += half;
    halves_are_one = !packed && half == up_proj.size(up_proj.dim() - 2) * up[0].f_stride;
    interleaved = !packed && !halves_are_one && up[0].f_stride == 2 * half;
    if (interleaved) halves_are_one = true, up[0].f_stride = half;
  }
};

// The up projection's bias, (E, 2, F) or (E, F), or flat among packed experts; or its gradient. Any strides.
template <typename T>
struct UpBias {
  T* data = nullptr;
  int64_t expert_stride = 0, packed_stride = 0, half_stride = 0, f_stride = 1;

  UpBias() = default;
  UpBias(const Tensor& tensor, bool gated, bool packed)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))),
        expert_stride(packed ? 0 : Weight<T>::stride_of(tensor, -tensor.dim())),
        packed_stride(packed ? Weight<T>::stride_of(tensor, -1) : 0),
        half_stride(gated ? Weight<T>::stride_of(tensor, -2) : 0),
        f_stride(Weight<T>::stride_of(tensor, -1)) {}

  // Of an expert's half, `start` being its first column among packed ones.
  T* at(int64_t expert, int64_t half, int64_t start) const {
    return data + expert * expert_stride + half * half_stride + start * packed_stride;
  }
};

}  // namespace dmoe
