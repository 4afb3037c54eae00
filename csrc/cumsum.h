// What the CPU and the CUDA side of the two running sums share.
#pragma once

#include <cstdint>

#include "check.h"

namespace dmoe {

// A contiguous 1-D or 2-D tensor seen as (outer, length, inner), with the sums along `length`.
struct CumsumShape {
  int64_t outer, length, inner;

  CumsumShape(const char* op, const Tensor& x, int64_t dim) {
    DMOE_CHECK(x.dim() == 1 || x.dim() == 2, op, ": x: expected one or two dimensions, got shape ", shape_of(x));
    DMOE_CHECK(dim >= 0 && dim < x.dim(), op, ": dim: expected 0 .. ", x.dim() - 1, ", got ", dim);
    outer = dim == 1 ? x.size(0) : 1;
    length = x.size(dim);
    inner = x.dim() == 2 && dim == 0 ? x.size(1) : 1;
  }
};

}  // namespace dmoe
