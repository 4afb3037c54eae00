// Up to where thin products are thin.
#include "products.h"

#include <algorithm>
#include <cstdint>

#include "blocked_gemm.h"
#include "cpu_level.h"
#include "few_rows.h"
#include "product_choice.h"

namespace dmoe {
namespace {

// Up to how many rows, columns or numbers in a sum the thin kernels are the faster ones. `rows` of a weight whose columns
// are contiguous, `rows_axpy` of one whose rows are, `gradient` of sums that make a weight gradient, `sums` of others.
struct Limits {
  int64_t rows, rows_axpy, columns, gradient, sums;
};

// Against blocked kernels on one thread of a Zen 4 (weights of 512 x 512 and 1024 x 2048; 256 rows, sums of 512): thin
// ones take 0.3 to 0.6 of the time at 4 rows, 0.5 to 0.7 at 8 and 0.8 to 0.95 at the limits here. Against MKL and
// oneDNN they win for longer. What nobody measured, processors without AVX2 and other makers', keeps to a handful.
Limits limits_of(ScalarType dtype) {
  const few::Level level = few::level();
  if (level == few::Level::kPortable) return {4, 4, 4, 4, 0};
  if (dtype == ScalarType::Float) return level == few::Level::kAvx2 ? Limits{16, 8, 8, 8, 0} : Limits{32, 32, 16, 32, 0};
  if (dtype == ScalarType::BFloat16 && level == few::Level::kAvx512Bf16) return {32, 16, 16, 32, 32};
  return level == few::Level::kAvx2 ? Limits{16, 8, 8, 0, 0} : Limits{32, 12, 16, 0, 0};  // widened as they are read
}

bool in_blocks(ScalarType dtype) { return choice_of(dtype).blocked; }

// Which thin product this is, if it is one.
Thin thin_kind(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype) {
  const auto is_readable = [](const Matrix& m) { return m.row_stride == 1 || m.col_stride == 1; };
  const Limits limits = limits_of(dtype);
  if (is_readable(b) && a.cols <= out.cols) {
    const bool gradient = a.row_stride == 1 && b.col_stride == 1;
    if (a.cols <= (gradient ? limits.gradient : limits.sums)) return Thin::kSums;
  }
  if (is_readable(a) && out.cols < out.rows && out.cols <= limits.columns) return Thin::kColumns;
  const int64_t most = b.col_stride != 1 ? limits.rows : limits.rows_axpy;
  return is_readable(b) && out.rows <= most ? Thin::kRows : Thin::kNot;
}

}  // namespace

int64_t rows_to_give(int64_t rows, ScalarType dtype) {
  return in_blocks(dtype) || rows <= limits_of(dtype).rows_axpy ? rows : round_up_rows(rows, dtype);
}
int64_t rows_to_give(int64_t rows, int64_t columns, ScalarType dtype) {
  return columns <= limits_of(dtype).columns ? rows : rows_to_give(rows, dtype);
}
int64_t sums_to_give(int64_t sums, int64_t rows, int64_t columns, ScalarType dtype) {
  return std::min(rows, columns) <= limits_of(dtype).columns ? sums : rows_to_give(sums, dtype);
}

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate) {
  if (dtype == ScalarType::Double || out.col_stride != 1) return mm_out(out, a, b, dtype, accumulate);
  if (out.rows == 0 || out.cols == 0) return;
  if (a.cols == 0) return accumulate ? void() : fill_with_zeros(out, dtype == ScalarType::Float ? 4 : 2);
  const Thin thin = thin_kind(out, a, b, dtype);
  if (thin != Thin::kNot) return multiply_thin(out, a, b, dtype, accumulate, thin);
  if (in_blocks(dtype) && blocked_takes(out, a, b)) return multiply_blocked(out, a, b, dtype, accumulate);
  mm_out(out, a, b, dtype, accumulate);
}

}  // namespace dmoe
