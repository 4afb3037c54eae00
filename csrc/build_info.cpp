// What this library was built for, so that `dmoe.info()` reports facts instead of guesses.
#include <string>

#include <torch/csrc/stable/library.h>

namespace {
std::string cuda_archs() { return DMOE_CUDA_ARCHS; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmoe, CompositeExplicitAutograd, m) { m.impl("cuda_archs", TORCH_BOX(&cuda_archs)); }
