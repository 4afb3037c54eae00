// unpermute and its backward on the CPU: tokens, then rows, in parallel; every element has one writer, so sums are in
// slot order on any number of threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "pages.h"
#include "unpermute.h"

namespace dmoe {
namespace {

// Sums are kept in float64 for float64 rows, in float32 for every other dtype; gate weights are read as that type.
template <typename Scalar>
using Sum = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

ScalarType sum_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor unpermute(const Tensor& rows, const std::optional<Tensor>& gate_weights, const Tensor& row_to_token,
                 const std::optional<Tensor>& row_to_slot, const Tensor& token_offsets, const Tensor& token_rows) {
  check_dim("unpermute", "rows", rows, 2);
  const Tensor source = torch::stable::contiguous(rows);
  const Tensor offsets = int32_vector("unpermute", "token_offsets", token_offsets);
  const Tensor rows_of = int32_vector("unpermute", "token_rows", token_rows);
  const int64_t num_rows = rows.size(0), hidden = rows.size(1), assignments = token_rows.size(0);
  DMOE_CHECK(offsets.size(0) >= 1, "unpermute: token_offsets: expected a leading 0, got an empty tensor");
  const int64_t tokens = offsets.size(0) - 1;
  std::optional<Tensor> weights;
  if (gate_weights) weights = prepare_weights("unpermute", *gate_weights, assignments, sum_type(rows));
  Tensor out = large_empty(source, {tokens, hidden});

  const auto* offset = static_cast<const int32_t*>(offsets.data_ptr());
  const auto* row_of = static_cast<const int32_t*>(rows_of.data_ptr());
  std::atomic<int64_t> bad_token{-1};
  dispatch_floating("unpermute", "rows", rows, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto* from = static_cast<const Scalar*>(source.data_ptr());
    const auto* weight = weights ? static_cast<const Sum<Scalar>*>(weights->data_ptr()) : nullptr;
    auto* to = static_cast<Scalar*>(out.data_ptr());
    const int64_t per_token = (assignments / std::max<int64_t>(1, tokens) + 1) * (hidden + 1);
    const int64_t grain = std::max<int64_t>(1, 16384 / per_token);
    torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
      std::vector<Sum<Scalar>> sums(hidden);
      for (int64_t token = begin; token < end; ++token) {
        std::fill(sums.begin(), sums.end(), Sum<Scalar>(0));
        const int64_t first = offset[token], last = offset[token + 1];
        bool bad = first < 0 || last < first || last > assignments;
        for (int64_t j = first; j < last && !bad; ++j) {
          const int64_t row = row_of[j];
          if (row == -1) continue;
          bad = row < 0 || row >= num_rows;
          if (bad) break;
          const Scalar* values = from + row * hidden;
          Sum<Scalar>* sum = sums.data();
          const Sum<Scalar> w = weight ? weight[j] : Sum<Scalar>(1);
          for (int64_t h = 0; h < hidden; ++h) sum[h] += w * static_cast<Sum<Scalar>>(values[h]);
        }
        if (bad) bad_token.store(token, std::memory_order_relaxed);
        for (int64_t h = 0; h < hidden; ++h) to[token * hidden + h] = static_cast<Scalar>(sums[h]);
      }
    });
  });
  const int64_t bad = bad_token.load();
  DMOE_CHECK(bad < 0, "unpermute: token ", bad, ": expected token_offsets ascending from 0 to ", assignments,
             " and token_rows from 0 to ", num_rows - 1, ", or -1; got token_offsets ", offset[bad], ", ",
             offset[bad + 1], " or a row out of range between them");
  return out;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows, const Tensor& gate_weights,
                                              const Tensor& row_to_token, const Tensor& row_to_slot,
                                              const Tensor& token_offsets, const Tensor& token_rows) {
  constexpr const char* kOp = "unpermute_backward";
  check_dim(kOp, "grad", grad, 2);
  check_dim(kOp, "rows", rows, 2);
  check_dtype(kOp, "grad", grad, rows.scalar_type());
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor source = torch::stable::contiguous(rows);
  const Tensor tokens_of = int32_vector(kOp, "row_to_token", row_to_token);
  const Tensor slots_of = int32_vector(kOp, "row_to_slot", row_to_slot);
  const Tensor offsets = int32_vector(kOp, "token_offsets", token_offsets);
  const int64_t num_rows = rows.size(0), hidden = rows.size(1), tokens = grad.size(0);
  const int64_t assignments = token_rows.size(0);
  DMOE_CHECK(grad.size(1) == hidden && offsets.size(0) == tokens + 1 && tokens_of.size(0) == num_rows &&
                 slots_of.size(0) == num_rows,
             kOp, ": expected grad (T, H), rows (R, H), row_to_token (R,), row_to_slot (R,), token_offsets (T + 1,); "
             "got ", shape_of(grad), ", ", shape_of(rows), ", ", shape_of(row_to_token), ", ",
             shape_of(row_to_slot), ", ", shape_of(token_offsets));
  const Tensor weights = prepare_weights(kOp, gate_weights, assignments, sum_type(rows));
  Tensor grad_rows = large_empty(source, {num_rows, hidden});
  Tensor grad_weights = torch::stable::new_zeros(weights, {assignments});  // zero is what a dropped assignment keeps

  const auto* token_of = static_cast<const int32_t*>(tokens_of.data_ptr());
  const auto* slot_of = static_cast<const int32_t*>(slots_of.data_ptr());
  const auto* offset = static_cast<const int32_t*>(offsets.data_ptr());
  std::atomic<int64_t> bad_row{-1};
  dispatch_floating(kOp, "rows", rows, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto* dy = static_cast<const Scalar*>(upstream.data_ptr());
    const auto* values = static_cast<const Scalar*>(source.data_ptr());
    const auto* weight = static_cast<const Sum<Scalar>*>(weights.data_ptr());
    auto* drows = static_cast<Scalar*>(grad_rows.data_ptr());
    auto* dweights = static_cast<Sum<Scalar>*>(grad_weights.data_ptr());
    const int64_t grain = std::max<int64_t>(1, 16384 / (hidden + 1));
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t token = token_of[row];
        Scalar* to = drows + row * hidden;
        const bool in_range = token >= 0 && token < tokens;
        const int64_t j = in_range ? int64_t{offset[token]} + slot_of[row] : -1;
        if (!in_range || j < offset[token] || j >= offset[token + 1] || j >= assignments || j < 0) {
          std::fill(to, to + hidden, Scalar(0));
          if (token != -1) bad_row.store(row, std::memory_order_relaxed);
          continue;
        }
        const Scalar* dy_row = dy + token * hidden;
        const Scalar* row_values = values + row * hidden;
        const Sum<Scalar> w = weight[j];
        constexpr int kLanes = 8;  // separate sums, which the compiler may keep in one vector register
        Sum<Scalar> dots[kLanes] = {};
        int64_t h = 0;
        for (; h + kLanes <= hidden; h += kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const auto g = static_cast<Sum<Scalar>>(dy_row[h + lane]);
            to[h + lane] = static_cast<Scalar>(w * g);
            dots[lane] += g * static_cast<Sum<Scalar>>(row_values[h + lane]);
          }
        }
        for (; h < hidden; ++h) {
          const auto g = static_cast<Sum<Scalar>>(dy_row[h]);
          to[h] = static_cast<Scalar>(w * g);
          dots[0] += g * static_cast<Sum<Scalar>>(row_values[h]);
        }
        dweights[j] = ((dots[0] + dots[4]) + (dots[1] + dots[5])) + ((dots[2] + dots[6]) + (dots[3] + dots[7]));
      }
    });
  });
  const int64_t bad = bad_row.load();
  DMOE_CHECK(bad < 0, kOp, ": row ", bad, ": expected -1, or a token from 0 to ", tokens - 1,
             " and one of its slots; got row_to_token ", token_of[bad], ", row_to_slot ", slot_of[bad]);
  return {grad_rows, torch::stable::to(grad_weights, gate_weights.scalar_type())};
}

}  // namespace
}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("unpermute", TORCH_BOX(&dmoe::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&dmoe::unpermute_backward));
}
