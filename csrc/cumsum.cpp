// Running sums on the CPU. Sums are taken in the unsigned type, where wrapping around is defined.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "cumsum.h"
#include "dispatch.h"
#include "runs.h"

namespace dmoe {
namespace {

constexpr int64_t kMinRun = 32768;

template <bool kExclusive, typename Sum>
Sum scan(const Sum* x, Sum* out, int64_t begin, int64_t end, Sum sum) {
  for (int64_t i = begin; i < end; ++i) {
    const Sum value = x[i];
    out[i] = kExclusive ? sum : static_cast<Sum>(sum + value);
    sum = static_cast<Sum>(sum + value);
  }
  return sum;
}

// One long row: sums of the runs first, then every run from the sum of those before it.
template <bool kExclusive, typename Sum>
void scan_row(const Sum* x, Sum* out, int64_t length) {
  const Runs runs(length, kMinRun);
  std::vector<Sum> sums(static_cast<size_t>(runs.count()), 0);
  if (runs.count() > 1) {
    runs.for_each([&](int64_t run, int64_t begin, int64_t end) {
      Sum sum = 0;
      for (int64_t i = begin; i < end; ++i) sum = static_cast<Sum>(sum + x[i]);
      sums[static_cast<size_t>(run)] = sum;
    });
    Sum before = 0;
    for (Sum& sum : sums) {
      const Sum own = sum;
      sum = before;
      before = static_cast<Sum>(before + own);
    }
  }
  runs.for_each([&](int64_t run, int64_t begin, int64_t end) {
    scan<kExclusive>(x, out, begin, end, sums[static_cast<size_t>(run)]);
  });
}

template <bool kExclusive, typename Sum>
void scan_all(const Sum* x, Sum* out, const CumsumShape& shape) {
  if (shape.inner == 1) {
    if (shape.outer == 1) return scan_row<kExclusive>(x, out, shape.length);
    const int64_t rows_per_run = std::max<int64_t>(1, kMinRun / std::max<int64_t>(1, shape.length));
    torch::stable::parallel_for(0, shape.outer, rows_per_run, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        scan<kExclusive>(x + row * shape.length, out + row * shape.length, 0, shape.length, Sum{0});
      }
    });
    return;
  }
  // Down the columns, a row at a time, so that memory is read in order; threads share the columns.
  const int64_t columns_per_run = std::max<int64_t>(16, kMinRun / std::max<int64_t>(1, shape.length));
  torch::stable::parallel_for(0, shape.inner, columns_per_run, [&](int64_t from, int64_t to) {
    std::vector<Sum> sums(static_cast<size_t>(to - from), 0);
    for (int64_t i = 0; i < shape.length; ++i) {
      const Sum* row = x + i * shape.inner + from;
      Sum* out_row = out + i * shape.inner + from;
      for (int64_t j = 0; j < to - from; ++j) {
        const Sum before = sums[static_cast<size_t>(j)];
        const Sum after = static_cast<Sum>(before + row[j]);
        out_row[j] = kExclusive ? before : after;
        sums[static_cast<size_t>(j)] = after;
      }
    }
  });
}

template <bool kExclusive>
Tensor cumsum(Tensor x, int64_t dim) {
  constexpr const char* kName = kExclusive ? "exclusive_cumsum" : "inclusive_cumsum";
  const CumsumShape shape(kName, x, dim);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  dispatch_integer(kName, "x", x, [&](auto zero) {
    using Sum = std::make_unsigned_t<decltype(zero)>;
    scan_all<kExclusive>(static_cast<const Sum*>(x.data_ptr()), static_cast<Sum*>(out.data_ptr()), shape);
  });
  return out;
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("inclusive_cumsum", TORCH_BOX(&dmoe::cumsum<false>));
  m.impl("exclusive_cumsum", TORCH_BOX(&dmoe::cumsum<true>));
}
