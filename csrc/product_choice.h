// Which of two ways large products go on this processor, blocked_gemm.h's or the library's: measured once and kept.
//
// The measurement takes some milliseconds at the first product of a dtype. What it found is appended to a file in the
// folder that set_product_cache() names, under a name made of the processor, its level and the versions given: processes
// that begin together measure once, as who holds the file's lock measures and the others read, and all of a machine then
// compute the same bits. Without such a folder every process measures for itself.
//
// DMOE_CPU_PRODUCTS=blocked or =library decides without a measurement.
#pragma once

#include <string>

#include <torch/headeronly/core/ScalarType.h>

namespace dmoe {

struct ProductChoice {
  bool blocked;
  double blocked_gflops, library_gflops;  // of one thread, as measured; 0 where nobody measured
};

// The choice for float32, bfloat16 or float16; float64 is the library's.
ProductChoice choice_of(torch::headeronly::ScalarType dtype);

// Where choices are kept from now on, and what beside the processor they hold for. An empty folder keeps none.
void set_product_cache(const std::string& folder, const std::string& versions);

}  // namespace dmoe
