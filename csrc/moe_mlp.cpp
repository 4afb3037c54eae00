// moe_mlp on the CPU: gather, both products and the activation per block of rows, then one weighted sum per token.
//
// What a composition of separate operations would cost and this does not: copies of x in expert order that live in
// memory (a block's rows stay in cache), a read and a write of the hidden layer between operations, full-size zero
// gradients for every slice of the weights, and one thread team per small product. Each task runs its products on one
// thread, so many small experts keep all cores busy, and one hot expert is cut into blocks of rows. Where few rows make
// few blocks, the columns of F and then those of H are cut too, and the hidden layer is handed on through memory.
//
// Bits depend on the shapes and the routing, never on which thread took which task.
#include <algorithm>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "dispatch.h"
#include "few_rows.h"
#include "gemm.h"
#include "moe_mlp.h"
#include "moe_rows.h"
#include "moe_weights.h"
#include "pages.h"
#include "philox.h"
#include "products.h"

namespace dmoe {
namespace {

using std::optional;
using std::string;
using std::vector;

// How work is cut depends on shapes and routing, never on the number of threads: the same bits on any machine of a kind.
constexpr int64_t kBlockRows = 128, kLargeBlockRows = 256;  // rows of one task; the larger ones from kManyRows on
constexpr int64_t kManyRows = 4096;
constexpr int64_t kWaveRows = 8192;      // rows whose backward buffers exist at once (one expert may need more)
constexpr int64_t kGradientShare = 16;   // a weight gradient's task is at most this part of its wave's work,
constexpr int64_t kGradientRows = 128;   // but has at least so many rows

enum class GateOn { kOutput, kActivation, kInput };

struct Arguments {
  Tensor x, gate_weights, up_proj, down_proj;
  optional<Tensor> up_bias, down_bias;
  Tensor expert_offsets, row_to_token, row_to_slot, token_offsets, token_rows;
  optional<Tensor> seed;
  vector<int64_t> ffn_sizes;
  string activation;
  bool gated;
  GateOn gate_on;
  double activation_dropout, expert_dropout;
  optional<Tensor> residual;   // added to y
  optional<Tensor> gate_proj;  // the gate's half of up_proj, where that is the other half only
  bool by_row;                 // see Problem::multiply()

  // How many rows of width F an expert's pre-activation has.
  int64_t halves() const { return gated ? 2 : 1; }
};

// F of the widest expert.
int64_t widest(const Arguments& args) {
  if (args.ffn_sizes.empty()) return args.down_proj.size(args.down_proj.dim() - 1);
  return *std::max_element(args.ffn_sizes.begin(), args.ffn_sizes.end());
}

// One expert's rows of the plan and the place of its weights.
struct Expert {
  int64_t begin, rows;       // rows of the plan
  int64_t width, start;      // its F, and its first column among packed experts of different widths
  int64_t padded, padded_begin;  // backward: rows of its buffers, rounded up, and the first of them in its wave
};

struct Block {
  int64_t expert, begin, rows;  // rows of the plan
};

struct Columns {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// Columns of a product of one block: block number `block` of its pass, and piece number `piece` of that block.
struct Piece {
  int64_t block, piece;
  Columns columns;
};

template <typename T>
struct Problem {
  using A = Accumulate<T>;
  static constexpr ScalarType kType = torch::headeronly::CppTypeToScalarType<T>::value;

  const Arguments& args;
  int64_t tokens, hidden, experts_count, rows_bound, assignments, width, total_width, pre_width;
  const T *x, *down_bias;
  Weights<T> weights;  // only read, and so is
  UpBias<T> up_bias;
  const A* gates;
  const int32_t *offsets, *row_to_token, *row_to_slot, *token_offsets, *token_rows;
  uint64_t seed = 0;
  vector<Expert> experts;

  explicit Problem(const Arguments& a) : args(a) {
    tokens = a.x.size(0), hidden = a.x.size(1);
    experts_count = a.expert_offsets.size(0) - 1;
    rows_bound = a.row_to_token.size(0), assignments = a.token_rows.size(0);
    total_width = a.down_proj.size(a.down_proj.dim() - 1);
    width = widest(a);
    pre_width = halves() * width;
    x = data(a.x), weights = Weights<T>(a.gated, packed(), a.up_proj, a.gate_proj, a.down_proj);
    if (a.up_bias) up_bias = UpBias<T>(*a.up_bias, a.gated, packed());
    down_bias = a.down_bias ? data(*a.down_bias) : nullptr;
    gates = static_cast<const A*>(a.gate_weights.const_data_ptr());
    offsets = index(a.expert_offsets), row_to_token = index(a.row_to_token), row_to_slot = index(a.row_to_slot);
    token_offsets = index(a.token_offsets), token_rows = index(a.token_rows);
    if (a.seed) seed = static_cast<uint64_t>(*static_cast<const int64_t*>(a.seed->const_data_ptr()));
    int64_t start = 0;
    for (int64_t e = 0; e < experts_count; ++e) {
      const int64_t size = a.ffn_sizes.empty() ? width : a.ffn_sizes[e];
      experts.push_back({offsets[e], offsets[e + 1] - offsets[e], size, start, 0, 0});
      start += size;
    }
  }

  // A product of a block's rows. With `by_row` a row depends on itself alone (multiply_by_row()), so that a token's
  // output and gradients do not depend on what else is in the batch; nothing is then cut by columns either, as what
  // is added up over the pieces of a row would be cut where the batch says.
  void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate = false) const {
    args.by_row ? multiply_by_row(out, a, b, kType, accumulate) : dmoe::multiply(out, a, b, kType, accumulate);
  }
  bool in_columns(const vector<Piece>& pieces, const vector<Block>& blocks) const {
    return pieces.size() > blocks.size() && !args.by_row;
  }

  static const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
  static const int32_t* index(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.const_data_ptr()); }

  bool packed() const { return !args.ffn_sizes.empty(); }

  // How many matrices an expert's up projection is: 2 where gate and up lie apart from each other. Where their rows take
  // turns it is one, and so do the columns of what it makes; the pre-activation has them one beside the other all the same.
  int64_t up_parts() const { return args.gated && !weights.halves_are_one ? 2 : 1; }
  bool interleaved() const { return weights.interleaved; }
  int64_t up_rows(int64_t e) const { return args.gated && up_parts() == 1 ? pre_width : experts[e].width; }
  int64_t halves() const { return args.halves(); }
  // An expert's bias of the up projection, half after half, each F numbers; empty without one.
  vector<T> up_bias_of(int64_t e) const {
    const int64_t f = experts[e].width;
    vector<T> bias(up_bias.data == nullptr ? 0 : halves() * f);
    for (int64_t half = 0; half < halves() && !bias.empty(); ++half) {
      const T* first = up_bias.at(e, half, experts[e].start);
      for (int64_t c = 0; c < f; ++c) bias[half * f + c] = first[c * up_bias.f_stride];
    }
    return bias;
  }

  // Rows [begin, end) of part `part` of expert e's up projection, or of its gradient.
  Matrix up_matrix(const Weights<T>& of, int64_t e, int64_t part, int64_t begin, int64_t end) const {
    const Weight<T>& weight = of.up[part];
    T* first = weight.data + weight.at(e, experts[e].start) + begin * weight.f_stride;
    return {first, end - begin, hidden, weight.f_stride, weight.h_stride};
  }
  Matrix up_matrix(int64_t e, int64_t part) const { return up_matrix(weights, e, part, 0, up_rows(e)); }
  // Rows [begin, end) of its gate's or its up's half, wherever that lies.
  Matrix half_matrix(int64_t e, int64_t half, int64_t begin, int64_t end) const {
    const bool apart = up_parts() == 2;
    const int64_t first = apart ? 0 : half * width;
    return up_matrix(weights, e, apart ? half : 0, first + begin, first + end);
  }

  // The same of the down projection, whose rows are H.
  Matrix down_matrix(const Weights<T>& of, int64_t e, int64_t begin, int64_t end) const {
    const Weight<T>& weight = of.down;
    T* first = weight.data + weight.at(e, experts[e].start) + begin * weight.h_stride;
    return {first, end - begin, experts[e].width, weight.h_stride, weight.f_stride};
  }
  Matrix down_matrix(int64_t e) const { return down_matrix(weights, e, 0, hidden); }

  // Zeros in the rows that dropped assignments left unused.
  void clear_unused(T* rows, int64_t columns) const {
    if (experts_count > 0) std::fill(rows + offsets[experts_count] * columns, rows + rows_bound * columns, T(0.0f));
  }

  int64_t assignment(int64_t row) const { return token_offsets[row_to_token[row]] + row_to_slot[row]; }
  A gate(int64_t row) const { return gates[assignment(row)]; }

  // Rows of the plan cut into tasks: an expert's blocks are of equal height, so that none is left with a handful of rows,
  // and the largest come first, so that no thread is left with one when the others are done.
  vector<Block> blocks(int64_t first, int64_t last) const {
    const int64_t most = rows_bound < kManyRows ? kBlockRows : kLargeBlockRows;
    vector<Block> out;
    for (int64_t e = first; e < last; ++e) {
      const int64_t rows = experts[e].rows, count = (rows + most - 1) / most;
      const int64_t height = count == 0 ? 0 : ((rows + count - 1) / count + 15) / 16 * 16;
      for (int64_t row = 0; row < rows; row += height) {
        out.push_back({e, experts[e].begin + row, std::min(height, rows - row)});
      }
    }
    const auto work = [&](const Block& block) { return block.rows * experts[block.expert].width; };
    std::stable_sort(out.begin(), out.end(), [&](const Block& a, const Block& b) { return work(a) > work(b); });
    return out;
  }

  // The products of blocks cut by column_width(): of `columns(expert)` columns, sums over `inner(expert)` numbers.
  template <typename Inner, typename Number>
  vector<Piece> pieces(const vector<Block>& blocks, const Inner& inner, const Number& columns) const {
    int64_t all_rows = 0;
    for (const Block& block : blocks) all_rows += block.rows;
    vector<Piece> out;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int64_t count = columns(blocks[i].expert);
      const int64_t step = column_width(blocks[i].rows, all_rows, inner(blocks[i].expert), count);
      for (int64_t begin = 0; begin < count; begin += step) {
        out.push_back({static_cast<int64_t>(i), begin / step, {begin, std::min(count, begin + step)}});
      }
    }
    return out;
  }
  // Of the products with F columns, and of those with H.
  vector<Piece> pieces_of_width(const vector<Block>& blocks, int64_t products) const {
    return pieces(blocks, [&](int64_t) { return products * hidden; }, [&](int64_t e) { return experts[e].width; });
  }
  vector<Piece> pieces_of_hidden(const vector<Block>& blocks, int64_t products) const {
    return pieces(blocks, [&](int64_t e) { return products * experts[e].width; }, [&](int64_t) { return hidden; });
  }

  // fn(i) for each of a few blocks, by threads where there are several.
  template <typename Function>
  void each_block(const vector<Block>& blocks, const Function& fn) const {
    if (blocks.size() == 1) return fn(0);
    parallel_tasks(static_cast<int64_t>(blocks.size()), fn);
  }

  // x (times the gate weight, where that is on the input) of the rows of a block; zeros in holes.
  void gather(const T* source, const Block& block, bool weighted, T* out) const {
    for (int64_t r = 0; r < block.rows; ++r, out += hidden) {
      const int64_t row = block.begin + r;
      const int64_t token = row_to_token[row];
      if (token < 0) {
        std::fill(out, out + hidden, T(0.0f));
      } else if (weighted) {
        scale_row<T>(source + token * hidden, gate(row), out, hidden);
      } else {
        std::memcpy(out, source + token * hidden, hidden * sizeof(T));
      }
    }
  }

  // y[t] = sum of the token's rows, in slot order, weighted or not; and of its residual, when there is one. With
  // `by_row` a weighted row is rounded before it is added, as one that comes from another rank is: the sum then has the
  // same bits wherever its rows were computed.
  void combine(const T* rows, bool weighted, const T* residual, T* y) const {
    torch::stable::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      vector<A> sum(hidden);
      vector<T> rounded(weighted && args.by_row ? hidden : 0);
      for (int64_t t = begin; t < end; ++t) {
        T* out = y + t * hidden;
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t j = token_offsets[t]; j < token_offsets[t + 1] && !rounded.empty(); ++j) {
          if (token_rows[j] < 0) continue;
          scale_row<T>(rows + token_rows[j] * hidden, gates[j], rounded.data(), hidden);
          accumulate_row<T>(sum.data(), A(1), rounded.data(), hidden);
        }
        const T* row[4];
        A weight[4];
        int count = 0;
        for (int64_t j = token_offsets[t]; j < token_offsets[t + 1] && rounded.empty(); ++j) {
          if (token_rows[j] < 0) continue;
          row[count] = rows + token_rows[j] * hidden;
          weight[count] = weighted ? gates[j] : A(1);
          if (++count < 4) continue;
          accumulate_four<T>(sum.data(), weight, row, hidden);
          count = 0;
        }
        for (int i = 0; i < count; ++i) accumulate_row<T>(sum.data(), weight[i], row[i], hidden);
        if (residual != nullptr) accumulate_row<T>(sum.data(), A(1), residual + t * hidden, hidden);
        store_row<T>(sum.data(), out, hidden);
      }
    });
  }
};

thread_local Scratch scratch_a, scratch_b, scratch_c, scratch_d;

// ---------------------------------------------------------------------------------------------------------- forward

// Where the rows of a block are on their way: `padded` rows of x, pre-activation, hidden layer (F columns) and result.
// Where the weights are interleaved so is `pre`, and `kept` has it half beside half; null where nobody keeps it.
template <typename T>
struct ForwardRows {
  int64_t padded;
  T *x, *pre, *hidden, *out, *kept = nullptr;
};

// Columns of F: the up projection of the gathered rows and the activation.
template <typename T, typename Activation>
void forward_up(const Problem<T>& p, const Activation& activation, const Block& block, const Columns& columns,
                const ForwardRows<T>& at) {
  using A = Accumulate<T>;
  const int64_t f = p.experts[block.expert].width, f_max = p.width, begin = columns.begin, count = columns.count();
  const Matrix x_rows = row_major(at.x, at.padded, p.hidden, p.hidden);
  if (p.interleaved()) {
    p.multiply(row_major(at.pre + 2 * begin, at.padded, 2 * count, p.pre_width), x_rows,
             transposed(p.up_matrix(p.weights, block.expert, 0, 2 * begin, 2 * columns.end)));
  } else if (count == f) {
    for (int64_t part = 0; part < p.up_parts(); ++part) {
      const Matrix out = row_major(at.pre + part * f_max, at.padded, p.up_rows(block.expert), p.pre_width);
      p.multiply(out, x_rows, transposed(p.up_matrix(block.expert, part)));
    }
  } else {
    for (int64_t half = 0; half < p.halves(); ++half) {
      p.multiply(row_major(at.pre + half * f_max + begin, at.padded, count, p.pre_width), x_rows,
             transposed(p.half_matrix(block.expert, half, begin, columns.end)));
    }
  }

  vector<A> mask(p.args.activation_dropout > 0 ? f : 0);
  const vector<T> bias = p.up_bias_of(block.expert);
  vector<T> apart(p.interleaved() && at.kept == nullptr ? p.pre_width : 0);  // one row
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t row = block.begin + r;
    const bool real = p.row_to_token[row] >= 0;
    T* pre_row = at.pre + r * p.pre_width;
    if (p.interleaved()) {
      const T* both = pre_row + 2 * begin;
      pre_row = at.kept == nullptr ? apart.data() : at.kept + r * p.pre_width;
      split_row<T>(both, pre_row + begin, pre_row + begin + f_max, count);
    }
    T* gate_part = pre_row + begin;
    T* up_part = p.args.gated ? gate_part + f_max : nullptr;
    for (int64_t half = 0; half < p.halves() && !bias.empty() && real; ++half) {
      add_row<T>(gate_part + half * f_max, bias.data() + half * f + begin, count);
    }
    for (int64_t half = 0; half < p.halves() && columns.end == f && f < f_max; ++half) {
      std::fill(gate_part + half * f_max + count, gate_part + (half + 1) * f_max - begin, T(0.0f));
    }
    if (!mask.empty() && real) {
      dropout_row<A>(p.seed, p.assignment(row), kActivationDropout, p.args.activation_dropout, f, mask.data());
    }
    const A scale = p.args.gate_on == GateOn::kActivation && real ? p.gate(row) : A(1);
    activate_row<T>(activation, gate_part, up_part, scale, mask.empty() ? nullptr : mask.data() + begin,
                    at.hidden + r * f + begin, count);
  }
}

// Columns of H: the down projection, its bias and dropout.
template <typename T>
void forward_down(const Problem<T>& p, const Block& block, const Columns& columns, const ForwardRows<T>& at) {
  using A = Accumulate<T>;
  const int64_t f = p.experts[block.expert].width, begin = columns.begin, count = columns.count();
  const Matrix weight = transposed(p.down_matrix(block.expert));
  p.multiply(row_major(at.out + begin, at.padded, count, p.hidden), row_major(at.hidden, at.padded, f, f),
         columns_of(weight, begin, columns.end, sizeof(T)));
  vector<A> mask(p.args.expert_dropout > 0 ? p.hidden : 0);
  for (int64_t r = 0; r < block.rows && (p.down_bias != nullptr || !mask.empty()); ++r) {
    const int64_t row = block.begin + r;
    if (p.row_to_token[row] < 0) continue;
    T* out = at.out + r * p.hidden + begin;
    if (p.down_bias != nullptr) add_row<T>(out, p.down_bias + block.expert * p.hidden + begin, count);
    if (!mask.empty()) {
      dropout_row<A>(p.seed, p.assignment(row), kExpertDropout, p.args.expert_dropout, p.hidden, mask.data());
      multiply_row<T>(out, mask.data() + begin, out, count);
    }
  }
}

// One block of rows as one task: pre-activation (kept when `pre` is given), hidden, and the down projection's rows.
template <typename T, typename Activation>
void forward_block(const Problem<T>& p, const Activation& activation, const Block& block, T* pre, T* rows_out) {
  const int64_t padded = rows_to_give(block.rows, p.kType), f = p.experts[block.expert].width;
  const bool whole = padded == block.rows;
  // The rounded-up rows belong to the next expert, so the products may write them only into scratch.
  const bool pre_in_place = pre != nullptr && whole && !p.interleaved();
  const ForwardRows<T> at{
      padded, static_cast<T*>(scratch_a.get(padded * p.hidden * sizeof(T))),
      pre_in_place ? pre + block.begin * p.pre_width
                   : static_cast<T*>(scratch_b.get(padded * p.pre_width * sizeof(T))),
      static_cast<T*>(scratch_c.get(padded * f * sizeof(T))),
      whole ? rows_out + block.begin * p.hidden : static_cast<T*>(scratch_d.get(padded * p.hidden * sizeof(T))),
      pre != nullptr && p.interleaved() ? pre + block.begin * p.pre_width : nullptr};
  p.gather(p.x, block, p.args.gate_on == GateOn::kInput, at.x);
  forward_up<T>(p, activation, block, {0, f}, at);
  forward_down<T>(p, block, {0, p.hidden}, at);
  if (pre != nullptr && !pre_in_place && at.kept == nullptr) {
    std::memcpy(pre + block.begin * p.pre_width, at.pre, block.rows * p.pre_width * sizeof(T));
  }
  if (!whole) std::memcpy(rows_out + block.begin * p.hidden, at.out, block.rows * p.hidden * sizeof(T));
}

// Few blocks: all of F, by columns, then all of H.
template <typename T, typename Activation>
void forward_in_columns(const Problem<T>& p, const Activation& activation, const vector<Block>& blocks,
                        const vector<Piece>& of_width, T* pre, T* rows_out) {
  int64_t padded_rows = 0;
  for (const Block& block : blocks) padded_rows += rows_to_give(block.rows, p.kType);
  Tensor buffer = large_empty(p.args.x, {padded_rows * (2 * p.hidden + p.pre_width + p.width)});
  T* next = static_cast<T*>(buffer.mutable_data_ptr());
  const auto take = [&next](int64_t numbers) { return std::exchange(next, next + numbers); };
  vector<ForwardRows<T>> at;
  for (const Block& block : blocks) {
    const int64_t padded = rows_to_give(block.rows, p.kType);
    at.push_back({padded, take(padded * p.hidden), take(padded * p.pre_width), take(padded * p.width),
                  take(padded * p.hidden),
                  pre != nullptr && p.interleaved() ? pre + block.begin * p.pre_width : nullptr});
  }
  p.each_block(blocks, [&](int64_t i) { p.gather(p.x, blocks[i], p.args.gate_on == GateOn::kInput, at[i].x); });
  parallel_tasks(static_cast<int64_t>(of_width.size()), [&](int64_t task) {
    const Piece& piece = of_width[task];
    forward_up<T>(p, activation, blocks[piece.block], piece.columns, at[piece.block]);
  });
  const vector<Piece> of_hidden = p.pieces_of_hidden(blocks, 1);
  parallel_tasks(static_cast<int64_t>(of_hidden.size()), [&](int64_t task) {
    const Piece& piece = of_hidden[task];
    forward_down<T>(p, blocks[piece.block], piece.columns, at[piece.block]);
  });
  p.each_block(blocks, [&](int64_t i) {
    const Block& block = blocks[i];
    if (pre != nullptr && at[i].kept == nullptr) {
      std::memcpy(pre + block.begin * p.pre_width, at[i].pre, block.rows * p.pre_width * sizeof(T));
    }
    std::memcpy(rows_out + block.begin * p.hidden, at[i].out, block.rows * p.hidden * sizeof(T));
  });
}

template <typename T>
void forward(const Arguments& args, T* y, T* pre) {
  const Problem<T> p(args);
  Tensor rows_out = large_empty(args.x, {p.rows_bound, p.hidden});
  T* rows = static_cast<T*>(rows_out.mutable_data_ptr());
  const vector<Block> blocks = p.blocks(0, p.experts_count);
  with_activation(args.activation, args.gated, [&](const auto& activation) {
    const vector<Piece> of_width = p.pieces_of_width(blocks, p.halves());
    if (p.in_columns(of_width, blocks)) return forward_in_columns<T>(p, activation, blocks, of_width, pre, rows);
    parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
      forward_block<T>(p, activation, blocks[task], pre, rows);
    });
  });
  if (pre != nullptr) p.clear_unused(pre, p.pre_width);
  p.combine(rows, args.gate_on == GateOn::kOutput, args.residual ? p.data(*args.residual) : nullptr, y);
}

// --------------------------------------------------------------------------------------------------------- backward

// Rows of an expert's backward buffers. Where products are generated per shape, the number of rows summed over by the
// weight gradients is rounded up to one of 16 steps an octave, with zeros, so that few shapes ever occur.
int64_t padded_rows(int64_t rows, ScalarType dtype) {
  if (rows_to_give(rows, dtype) == rows) return rows;
  int64_t step = 16;
  while (step * 16 < rows) step *= 2;
  return (rows + step - 1) / step * step;
}

template <typename T>
struct Gradients {
  T *x, *down_bias;
  Accumulate<T>* gate;
  Weights<T> weights = {};
  UpBias<T> up_bias = {};
  T *pre = nullptr, *hidden = nullptr;  // by row of the plan, for the weights' half of a backward in two
};

// Buffers of the experts of one wave, by padded row: what the weight gradients sum over.
template <typename T>
struct Wave {
  T *x, *grad_out, *hidden, *grad_pre;
};

// Where the rows of a block are in a wave; hidden and grad_pre have room for the widest expert, this one's lie f apart.
// The columns of grad_pre are in the order of the up projection's rows.
template <typename T>
struct BackwardRows {
  int64_t padded;
  T *x, *grad_out, *hidden, *grad_pre, *out;
};

template <typename T>
BackwardRows<T> backward_rows(const Problem<T>& p, const Block& block, const Wave<T>& wave) {
  const Expert& expert = p.experts[block.expert];
  const int64_t local = block.begin - expert.begin, place = expert.padded_begin + local, f = expert.width;
  return {rows_to_give(block.rows, p.kType), wave.x + place * p.hidden, wave.grad_out + place * p.hidden,
          wave.hidden + expert.padded_begin * p.width + local * f,
          wave.grad_pre + expert.padded_begin * p.pre_width + local * p.halves() * f, nullptr};
}

template <typename T>
void backward_gather(const Problem<T>& p, const Block& block, const T* grad_y, const BackwardRows<T>& at) {
  using A = Accumulate<T>;
  p.gather(p.x, block, p.args.gate_on == GateOn::kInput, at.x);
  p.gather(grad_y, block, false, at.grad_out);
  vector<A> mask(p.args.expert_dropout > 0 ? p.hidden : 0);
  for (int64_t r = 0; r < block.rows && !mask.empty(); ++r) {
    if (p.row_to_token[block.begin + r] < 0) continue;
    const int64_t counter = p.assignment(block.begin + r);
    dropout_row<A>(p.seed, counter, kExpertDropout, p.args.expert_dropout, p.hidden, mask.data());
    multiply_row<T>(at.grad_out + r * p.hidden, mask.data(), at.grad_out + r * p.hidden, p.hidden);
  }
}

// Columns of F: through the down projection and the activation. `row_gate`, one number a row of the block, receives
// what these columns add to the gradients of the gate weights.
template <typename T, typename Activation>
void backward_down(const Problem<T>& p, const Activation& activation, const Block& block, const Columns& columns,
                   const T* pre, const BackwardRows<T>& at, Accumulate<T>* row_gate) {
  using A = Accumulate<T>;
  const int64_t f = p.experts[block.expert].width, halves = p.halves(), begin = columns.begin, count = columns.count();
  vector<A> mask(p.args.activation_dropout > 0 ? f : 0), room(count);
  vector<T> apart(p.interleaved() ? 2 * count : 0);  // a row's gradients of gate and up
  p.multiply(row_major(at.hidden + begin, at.padded, count, f), row_major(at.grad_out, at.padded, p.hidden, p.hidden),
         columns_of(p.down_matrix(block.expert), begin, columns.end, sizeof(T)));

  // Rows that fill the block up are summed over by the weight gradients: they must be zero, like holes.
  for (int64_t r = 0; r < at.padded; ++r) {
    const int64_t row = block.begin + r;
    T* hidden_row = at.hidden + r * f + begin;
    T* both = at.grad_pre + r * halves * f + 2 * begin;  // where they take turns
    T* grad_gate_part = p.interleaved() ? apart.data() : at.grad_pre + r * halves * f + begin;
    T* grad_up_part = grad_gate_part + (p.interleaved() ? count : f);
    if (r >= block.rows || p.row_to_token[row] < 0) {
      std::fill_n(hidden_row, count, T(0.0f));
      if (p.interleaved()) {
        std::fill_n(both, 2 * count, T(0.0f));
      } else {
        for (int64_t half = 0; half < halves; ++half) std::fill_n(grad_gate_part + half * f, count, T(0.0f));
      }
      if (r < block.rows) row_gate[r] = A(0);
      continue;
    }
    if (!mask.empty()) {
      dropout_row<A>(p.seed, p.assignment(row), kActivationDropout, p.args.activation_dropout, f, mask.data());
    }
    const T* gate_part = pre + row * p.pre_width + begin;
    const T* up_part = p.args.gated ? gate_part + p.width : nullptr;
    row_gate[r] = activate_row_backward<T>(
        activation, gate_part, up_part, hidden_row, p.args.gate_on == GateOn::kInput ? A(1) : p.gate(row),
        mask.empty() ? nullptr : mask.data() + begin, grad_gate_part, grad_up_part, hidden_row, room.data(), count);
    if (p.interleaved()) interleave_row<T>(grad_gate_part, grad_up_part, both, count);
  }
}

// Columns of H: through the up projection.
template <typename T>
void backward_up(const Problem<T>& p, const Block& block, const Columns& columns, const BackwardRows<T>& at) {
  const int64_t f = p.experts[block.expert].width, inner = p.up_rows(block.expert);
  for (int64_t part = 0; part < p.up_parts(); ++part) {
    p.multiply(row_major(at.out + columns.begin, at.padded, columns.count(), p.hidden),
           row_major(at.grad_pre + part * f, at.padded, inner, p.halves() * f),
           columns_of(p.up_matrix(block.expert, part), columns.begin, columns.end, sizeof(T)), part > 0);
  }
}

// What the gradients of the gate weights take of whole rows: the bias behind the experts, and a weight on the input.
template <typename T>
void finish_row_gate(const Problem<T>& p, const Block& block, const BackwardRows<T>& at, Accumulate<T>* row_gate) {
  const bool of_bias = p.args.gate_on == GateOn::kOutput && p.down_bias != nullptr;
  if (!of_bias && p.args.gate_on != GateOn::kInput) return;
  vector<Accumulate<T>> room(p.hidden);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t token = p.row_to_token[block.begin + r];
    if (token < 0) continue;
    if (of_bias) {
      row_gate[r] += dot<T>(p.down_bias + block.expert * p.hidden, at.grad_out + r * p.hidden, room.data(), p.hidden);
    } else {
      row_gate[r] = dot<T>(p.x + token * p.hidden, at.out + r * p.hidden, room.data(), p.hidden);
    }
  }
}

// One block of rows as one task.
template <typename T, typename Activation>
void backward_block(const Problem<T>& p, const Activation& activation, const Block& block, const T* grad_y,
                    const T* pre, const Wave<T>& wave, T* grad_rows, Accumulate<T>* row_gate) {
  BackwardRows<T> at = backward_rows(p, block, wave);
  const bool whole = at.padded == block.rows;
  at.out = whole ? grad_rows + block.begin * p.hidden
                 : static_cast<T*>(scratch_d.get(at.padded * p.hidden * sizeof(T)));
  backward_gather<T>(p, block, grad_y, at);
  backward_down<T>(p, activation, block, {0, p.experts[block.expert].width}, pre, at, row_gate + block.begin);
  backward_up<T>(p, block, {0, p.hidden}, at);
  finish_row_gate<T>(p, block, at, row_gate + block.begin);
  if (!whole) std::memcpy(grad_rows + block.begin * p.hidden, at.out, block.rows * p.hidden * sizeof(T));
}

// Few blocks: all of F, by columns, then all of H.
template <typename T, typename Activation>
void backward_in_columns(const Problem<T>& p, const Activation& activation, const vector<Block>& blocks,
                         const vector<Piece>& of_width, const T* grad_y, const T* pre, const Wave<T>& wave, T* grad_rows, Accumulate<T>* row_gate) {
  using A = Accumulate<T>;
  int64_t padded_rows = 0;
  for (const Block& block : blocks) padded_rows += rows_to_give(block.rows, p.kType);
  Tensor buffer = large_empty(p.args.x, {padded_rows * p.hidden});
  T* next = static_cast<T*>(buffer.mutable_data_ptr());
  vector<BackwardRows<T>> at;
  for (const Block& block : blocks) {
    at.push_back(backward_rows(p, block, wave));
    at.back().out = std::exchange(next, next + at.back().padded * p.hidden);
  }
  p.each_block(blocks, [&](int64_t i) { backward_gather<T>(p, blocks[i], grad_y, at[i]); });

  vector<vector<A>> parts(of_width.size());  // of the rows' gate gradients, by piece
  parallel_tasks(static_cast<int64_t>(of_width.size()), [&](int64_t task) {
    const Piece& piece = of_width[task];
    parts[task].resize(blocks[piece.block].rows);
    backward_down<T>(p, activation, blocks[piece.block], piece.columns, pre, at[piece.block], parts[task].data());
  });
  for (size_t task = 0; task < of_width.size(); ++task) {
    const Block& block = blocks[of_width[task].block];
    for (int64_t r = 0; r < block.rows; ++r) {
      A& sum = row_gate[block.begin + r];
      sum = of_width[task].piece == 0 ? parts[task][r] : sum + parts[task][r];
    }
  }
  const vector<Piece> of_hidden = p.pieces_of_hidden(blocks, p.halves());
  parallel_tasks(static_cast<int64_t>(of_hidden.size()), [&](int64_t task) {
    const Piece& piece = of_hidden[task];
    backward_up<T>(p, blocks[piece.block], piece.columns, at[piece.block]);
  });
  p.each_block(blocks, [&](int64_t i) {
    const Block& block = blocks[i];
    finish_row_gate<T>(p, block, at[i], row_gate + block.begin);
    std::memcpy(grad_rows + block.begin * p.hidden, at[i].out, block.rows * p.hidden * sizeof(T));
  });
}

// A block's rows as the weights' half takes them: experts stand as wide as the widest, with zeros behind their width.
template <typename T>
void keep_block(const Problem<T>& p, const Block& block, const Wave<T>& wave, const Gradients<T>& grads) {
  const Expert& expert = p.experts[block.expert];
  const int64_t f = expert.width, parts = p.halves(), local = block.begin - expert.begin;
  const auto keep = [&](const T* from, T* to) {
    std::memcpy(to, from, f * sizeof(T));
    std::fill(to + f, to + p.width, T(0.0f));
  };
  for (int64_t r = 0; r < block.rows; ++r) {
    keep(wave.hidden + expert.padded_begin * p.width + (local + r) * f, grads.hidden + (block.begin + r) * p.width);
    for (int64_t part = 0; part < parts; ++part) {
      keep(wave.grad_pre + expert.padded_begin * p.pre_width + ((local + r) * parts + part) * f,
           grads.pre + (block.begin + r) * p.pre_width + part * p.width);
    }
  }
}

// Part of one expert's weight gradients: rows [begin, end) of the up projection's (part 0 or 1) or the down projection's.
struct GradTask {
  int64_t expert, part, begin, end;
  double work;
};
constexpr int64_t kDownPart = 2, kBiasPart = 3;

// out = a @ b for an `out` whose rows or whose columns are contiguous. Products are fast where its rows are.
void product(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype) {
  if (out.col_stride != 1 && out.row_stride == 1) {
    multiply(transposed(out), transposed(b), transposed(a), dtype);
  } else {
    multiply(out, a, b, dtype);
  }
}

template <typename T>
void weight_gradient(const Problem<T>& p, const GradTask& task, const Wave<T>& wave, const Gradients<T>& grads) {
  using A = Accumulate<T>;
  const Expert& expert = p.experts[task.expert];
  const int64_t f = expert.width, n = expert.padded, parts = p.halves(), count = task.end - task.begin;
  const T* x_rows = wave.x + expert.padded_begin * p.hidden;
  const T* grad_out = wave.grad_out + expert.padded_begin * p.hidden;
  const T* hidden = wave.hidden + expert.padded_begin * p.width;
  const T* grad_pre = wave.grad_pre + expert.padded_begin * p.pre_width;
  if (task.part == kDownPart) {
    product(p.down_matrix(grads.weights, task.expert, task.begin, task.end),
            transposed(row_major(grad_out + task.begin, n, count, p.hidden)), row_major(hidden, n, f, f), p.kType);
  } else if (task.part == kBiasPart) {
    const bool weighted = p.args.gate_on == GateOn::kOutput;
    vector<A> sum(std::max(p.hidden, parts * f), A(0));
    if (p.up_bias.data != nullptr) {
      for (int64_t r = 0; r < expert.rows; ++r) accumulate_row<T>(sum.data(), A(1), grad_pre + r * parts * f, parts * f);
      const int64_t step = p.interleaved() ? 2 : 1, half_step = p.interleaved() ? 1 : f;
      for (int64_t half = 0; half < parts; ++half) {
        T* first = grads.up_bias.at(task.expert, half, expert.start);
        for (int64_t c = 0; c < f; ++c) store(first + c * grads.up_bias.f_stride, sum[half * half_step + c * step]);
      }
    }
    if (p.down_bias != nullptr) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t r = 0; r < expert.rows; ++r) {
        if (p.row_to_token[expert.begin + r] < 0) continue;
        accumulate_row<T>(sum.data(), weighted ? p.gate(expert.begin + r) : A(1), grad_out + r * p.hidden, p.hidden);
      }
      store_row<T>(sum.data(), grads.down_bias + task.expert * p.hidden, p.hidden);
    }
  } else {
    const T* columns = grad_pre + task.part * f + task.begin;
    product(p.up_matrix(grads.weights, task.expert, task.part, task.begin, task.end),
            transposed(row_major(columns, n, count, parts * f)), row_major(x_rows, n, p.hidden, p.hidden), p.kType);
  }
}

template <typename T>
vector<GradTask> gradient_tasks(const Problem<T>& p, int64_t first, int64_t last) {
  const int64_t parts = p.halves();
  double total = 0;  // products of both gradients, relative to hidden size
  for (int64_t e = first; e < last; ++e) total += static_cast<double>(p.experts[e].padded) * p.experts[e].width * (parts + 1);
  vector<GradTask> tasks;
  const auto cut = [&](int64_t e, int64_t part, int64_t rows, double work) {
    int64_t pieces = 1;
    while (work / pieces > total / kGradientShare && rows / (2 * pieces) >= kGradientRows) pieces *= 2;
    const int64_t height = std::max<int64_t>(((rows + pieces - 1) / pieces + 15) / 16 * 16, 1);
    for (int64_t begin = 0; begin < rows; begin += height) {
      tasks.push_back({e, part, begin, std::min(rows, begin + height), work / pieces});
    }
  };
  for (int64_t e = first; e < last; ++e) {
    const double rows = static_cast<double>(p.experts[e].padded) * p.experts[e].width;
    for (int64_t part = 0; part < p.up_parts(); ++part) cut(e, part, p.up_rows(e), rows * parts / p.up_parts());
    cut(e, kDownPart, p.hidden, rows);
    if (p.up_bias.data != nullptr || p.down_bias != nullptr) tasks.push_back({e, kBiasPart, 0, 0, 0});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const GradTask& a, const GradTask& b) { return a.work > b.work; });
  return tasks;
}

template <typename T>
void backward(const Arguments& args, const T* grad_y, const T* pre, bool of_weights, const Gradients<T>& grads) {
  using A = Accumulate<T>;
  Problem<T> p(args);
  Tensor grad_rows_buffer = large_empty(args.x, {p.rows_bound, p.hidden});
  T* grad_rows = static_cast<T*>(grad_rows_buffer.mutable_data_ptr());
  vector<A> row_gate(p.rows_bound);

  // Waves of experts share one set of buffers: their size follows kWaveRows, not the batch.
  vector<std::pair<int64_t, int64_t>> waves;
  int64_t buffer_rows = 0;
  for (int64_t e = 0, first = 0, rows = 0; e < p.experts_count; ++e) {
    const int64_t padded = padded_rows(p.experts[e].rows, p.kType);
    if (rows > 0 && rows + padded > kWaveRows) {
      waves.push_back({first, e});
      first = e, rows = 0;
    }
    p.experts[e].padded = padded, p.experts[e].padded_begin = rows;
    rows += padded;
    buffer_rows = std::max(buffer_rows, rows);
    if (e + 1 == p.experts_count) waves.push_back({first, e + 1});
  }
  const auto buffer = [&](int64_t columns) { return large_empty(args.x, {buffer_rows, columns}); };
  Tensor x_rows = buffer(p.hidden), grad_out = buffer(p.hidden), hidden = buffer(p.width), grad_pre = buffer(p.pre_width);
  const Wave<T> wave{static_cast<T*>(x_rows.mutable_data_ptr()), static_cast<T*>(grad_out.mutable_data_ptr()),
                     static_cast<T*>(hidden.mutable_data_ptr()), static_cast<T*>(grad_pre.mutable_data_ptr())};

  with_activation(args.activation, args.gated, [&](const auto& activation) {
    for (const auto& [first, last] : waves) {
      for (int64_t e = first; e < last; ++e) {  // the rows that only the rounding adds are zero
        const Expert& expert = p.experts[e];
        const int64_t extra = expert.padded - expert.rows, begin = expert.padded_begin + expert.rows;
        if (extra == 0) continue;
        const int64_t parts = p.halves();
        std::fill_n(wave.x + begin * p.hidden, extra * p.hidden, T(0.0f));
        std::fill_n(wave.grad_out + begin * p.hidden, extra * p.hidden, T(0.0f));
        std::fill_n(wave.hidden + expert.padded_begin * p.width + expert.rows * expert.width, extra * expert.width, T(0.0f));
        std::fill_n(wave.grad_pre + expert.padded_begin * p.pre_width + expert.rows * parts * expert.width,
                    extra * parts * expert.width, T(0.0f));
      }
      const vector<Block> blocks = p.blocks(first, last);
      const vector<Piece> of_width = p.pieces_of_width(blocks, 1);
      if (p.in_columns(of_width, blocks)) {
        backward_in_columns<T>(p, activation, blocks, of_width, grad_y, pre, wave, grad_rows, row_gate.data());
        if (grads.pre != nullptr) p.each_block(blocks, [&](int64_t i) { keep_block<T>(p, blocks[i], wave, grads); });
      } else {
        parallel_tasks(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
          backward_block<T>(p, activation, blocks[task], grad_y, pre, wave, grad_rows, row_gate.data());
          if (grads.pre != nullptr) keep_block<T>(p, blocks[task], wave, grads);
        });
      }
      if (!of_weights) continue;
      const vector<GradTask> tasks = gradient_tasks(p, first, last);
      parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t task) {
        weight_gradient<T>(p, tasks[task], wave, grads);
      });
    }
  });

  torch::stable::parallel_for(0, p.assignments, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) grads.gate[j] = p.token_rows[j] < 0 ? A(0) : row_gate[p.token_rows[j]];
  });
  p.combine(grad_rows, args.gate_on == GateOn::kInput, nullptr, grads.x);
  if (grads.pre != nullptr) p.clear_unused(grads.pre, p.pre_width), p.clear_unused(grads.hidden, p.width);
}

// ------------------------------------------------------------------------------------------------------ entry points

GateOn parse_gate_on(const string& name) {
  if (name == "output") return GateOn::kOutput;
  if (name == "activation") return GateOn::kActivation;
  DMOE_CHECK(name == "input", "moe_mlp: gate_weight_on: expected output, activation or input, got ", name);
  return GateOn::kInput;
}

void check(const Arguments& a) {
  const auto contiguous = [](const char* name, const Tensor& t) { check_contiguous("moe_mlp", name, t); };
  const auto shaped = [](const char* name, const Tensor& t, const vector<int64_t>& expected) {
    bool same = t.dim() == static_cast<int64_t>(expected.size());
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
    std::ostringstream text;
    for (size_t i = 0; i < expected.size(); ++i) text << (i ? ", " : "") << expected[i];
    DMOE_CHECK(same, "moe_mlp: ", name, ": expected shape (", text.str(), "), got ", shape_of(t));
  };
  const auto same_dtype = [&](const char* name, const Tensor& t) { check_dtype("moe_mlp", name, t, a.x.scalar_type()); };
  check_dim("moe_mlp", "x", a.x, 2);
  contiguous("x", a.x), contiguous("gate_weights", a.gate_weights);
  same_dtype("up_proj", a.up_proj), same_dtype("down_proj", a.down_proj);
  if (a.gate_proj) same_dtype("gate_proj", *a.gate_proj);
  if (a.up_bias) same_dtype("up_bias", *a.up_bias);
  if (a.down_bias) contiguous("down_bias", *a.down_bias), same_dtype("down_bias", *a.down_bias);
  if (a.residual) contiguous("residual", *a.residual), same_dtype("residual", *a.residual);
  check_dtype("moe_mlp", "gate_weights", a.gate_weights,
              a.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"expert_offsets", a.expert_offsets},
                                     {"row_to_token", a.row_to_token},
                                     {"row_to_slot", a.row_to_slot},
                                     {"token_offsets", a.token_offsets},
                                     {"token_rows", a.token_rows}}) {
    contiguous(name, tensor);
    check_dtype("moe_mlp", name, tensor, ScalarType::Int);
  }
  const int64_t experts = a.expert_offsets.numel() - 1, hidden = a.x.size(1), given = a.ffn_sizes.size();
  const auto sized = [](const char* name, const Tensor& t, int64_t expected) {
    DMOE_CHECK(t.numel() == expected, "moe_mlp: ", name, ": expected ", expected, " elements, got shape ", shape_of(t));
  };
  DMOE_CHECK(experts >= 1, "moe_mlp: expert_offsets: expected E + 1 elements, got ", experts + 1);
  DMOE_CHECK(given == 0 || given == experts, "moe_mlp: ffn_sizes: expected one for each of ", experts, " experts, got ",
             given);
  int64_t columns = 0;  // of all experts together
  for (const int64_t size : a.ffn_sizes) columns += size;
  if (given == 0) columns = experts * widest(a);
  using Shape = vector<int64_t>;
  Shape up = given == 0 ? Shape{experts, widest(a), hidden} : Shape{columns, hidden};
  DMOE_CHECK(a.gated || !a.gate_proj, "moe_mlp: gate_proj: expected None without a gate, got shape ",
             shape_of(*a.gate_proj));
  if (a.gate_proj) shaped("gate_proj", *a.gate_proj, up);
  Shape up_bias(up.begin(), up.end() - 1);
  if (a.gated) up_bias.insert(up_bias.end() - 1, 2);
  if (a.gated && !a.gate_proj) up.insert(up.end() - 2, 2);
  shaped("up_proj", a.up_proj, up);
  shaped("down_proj", a.down_proj, given == 0 ? Shape{experts, hidden, widest(a)} : Shape{hidden, columns});
  if (a.up_bias) shaped("up_bias", *a.up_bias, up_bias);
  if (a.down_bias) sized("down_bias", *a.down_bias, experts * hidden);
  if (a.residual) sized("residual", *a.residual, a.x.numel());
  sized("row_to_slot", a.row_to_slot, a.row_to_token.numel());
  sized("token_offsets", a.token_offsets, a.x.size(0) + 1);
  sized("gate_weights", a.gate_weights, a.token_rows.numel());
  const auto* offsets = static_cast<const int32_t*>(a.expert_offsets.const_data_ptr());
  DMOE_CHECK(offsets[0] == 0 && offsets[experts] <= a.row_to_token.numel(),
             "moe_mlp: expert_offsets: expected 0 to at most ", a.row_to_token.numel(), " rows, got ", offsets[0], " to ",
             offsets[experts]);
  if (a.seed) check_dtype("moe_mlp", "seed", *a.seed, ScalarType::Long);
  const bool random = a.activation_dropout > 0 || a.expert_dropout > 0;
  DMOE_CHECK(!random || a.seed, "moe_mlp: seed: expected a scalar int64 tensor with dropout, got None");
}

template <typename Function>
void dispatch(const Arguments& args, const Function& fn) {
  check(args);
  dispatch_floating("moe_mlp", "x", args.x, fn);
}

template <typename T>
T* out(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tile table serves the GPU; the main gradients are for the operation that is made of this one's backward.
#define DMOE_MOE_MLP_PARAMETERS                                                                               \
  Tensor x, Tensor gate_weights, Tensor up_proj, Tensor down_proj, optional<Tensor> up_bias,                  \
      optional<Tensor> down_bias, Tensor expert_offsets, Tensor row_to_token, Tensor row_to_slot,             \
      Tensor token_offsets, Tensor token_rows, optional<Tensor> seed, optional<vector<int64_t>> ffn_sizes,    \
      string activation, bool gated, string gate_weight_on, double activation_dropout, double expert_dropout, \
      optional<Tensor> residual, optional<Tensor> /*tiles*/, optional<Tensor> /*experts_by_load*/,            \
      int64_t /*tile_rows*/, optional<Tensor> /*up_main_grad*/, optional<Tensor> /*down_main_grad*/,          \
      optional<Tensor> gate_proj, optional<Tensor> /*gate_main_grad*/
#define DMOE_MOE_MLP_ARGUMENTS(by_row)                                                                  \
  Arguments {                                                                                           \
    x, gate_weights, up_proj, down_proj, up_bias, down_bias, expert_offsets, row_to_token, row_to_slot, \
        token_offsets, token_rows, seed, ffn_sizes.value_or(vector<int64_t>{}), activation, gated,      \
        parse_gate_on(gate_weight_on), activation_dropout, expert_dropout, residual, gate_proj, by_row  \
  }

template <bool kByRow>
std::tuple<Tensor, Tensor> moe_mlp(DMOE_MOE_MLP_PARAMETERS) {
  const Arguments args = DMOE_MOE_MLP_ARGUMENTS(kByRow);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}), pre;
  dispatch(args, [&](auto zero) {
    using T = decltype(zero);
    pre = large_empty(x, {row_to_token.size(0), args.halves() * widest(args)});
    forward<T>(args, out<T>(y), out<T>(pre));
  });
  return {y, pre};
}

template <bool kByRow>
Tensor moe_mlp_inference(DMOE_MOE_MLP_PARAMETERS) {
  const Arguments args = DMOE_MOE_MLP_ARGUMENTS(kByRow);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  dispatch(args, [&](auto zero) { forward<decltype(zero)>(args, out<decltype(zero)>(y), nullptr); });
  return y;
}

void check_backward(const Tensor& grad_y, const Tensor& pre_activation, const Tensor& x) {
  check_contiguous("moe_mlp_backward", "grad_y", grad_y);
  check_contiguous("moe_mlp_backward", "pre_activation", pre_activation);
  check_dtype("moe_mlp_backward", "grad_y", grad_y, x.scalar_type());
  DMOE_CHECK(grad_y.numel() == x.numel(), "moe_mlp_backward: grad_y: expected the shape of x, ", shape_of(x), ", got ",
             shape_of(grad_y));
}

using Gradients7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <bool kByRow>
Gradients7 moe_mlp_backward(Tensor grad_y, Tensor pre_activation, bool of_weights, DMOE_MOE_MLP_PARAMETERS) {
  const Arguments args = DMOE_MOE_MLP_ARGUMENTS(kByRow);
  check_backward(grad_y, pre_activation, x);
  const auto wanted = [&](const optional<Tensor>& tensor) {
    return tensor && of_weights ? large_empty_like(*tensor) : torch::stable::new_empty(x, {0});
  };
  Tensor grad_x = large_empty_like(x), grad_gate = large_empty_like(gate_weights);
  Tensor grad_up = wanted(up_proj), grad_down = wanted(down_proj);
  Tensor grad_up_bias = wanted(up_bias), grad_down_bias = wanted(down_bias), grad_gate_proj = wanted(gate_proj);
  dispatch(args, [&](auto zero) {
    using T = decltype(zero);
    Gradients<T> grads{out<T>(grad_x), out<T>(grad_down_bias), out<Accumulate<T>>(grad_gate)};
    if (of_weights) {
      const bool packed = !args.ffn_sizes.empty();
      const optional<Tensor> gate = gate_proj ? optional<Tensor>(grad_gate_proj) : std::nullopt;
      grads.weights = Weights<T>(gated, packed, grad_up, gate, grad_down);
      if (up_bias) grads.up_bias = UpBias<T>(grad_up_bias, gated, packed);
    }
    backward<T>(args, static_cast<const T*>(grad_y.const_data_ptr()),
                static_cast<const T*>(pre_activation.const_data_ptr()), of_weights, grads);
  });
  return {grad_x, grad_gate, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_gate_proj};
}

// The half without the weights' gradients, which grouped_gemm_weight makes of what this returns last.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward_data(Tensor grad_y, Tensor pre_activation,
                                                                 DMOE_MOE_MLP_PARAMETERS) {
  const Arguments args = DMOE_MOE_MLP_ARGUMENTS(false);
  check_backward(grad_y, pre_activation, x);
  Tensor grad_x = large_empty_like(x), grad_gate = large_empty_like(gate_weights), grad_pre = large_empty_like(pre_activation);
  Tensor hidden = large_empty(x, {row_to_token.size(0), widest(args)});
  dispatch(args, [&](auto zero) {
    using T = decltype(zero);
    Gradients<T> grads{};
    grads.x = out<T>(grad_x), grads.gate = out<Accumulate<T>>(grad_gate);
    grads.pre = out<T>(grad_pre), grads.hidden = out<T>(hidden);
    backward<T>(args, static_cast<const T*>(grad_y.const_data_ptr()),
                static_cast<const T*>(pre_activation.const_data_ptr()), false, grads);
  });
  return {grad_x, grad_gate, grad_pre, hidden};
}

}  // namespace

Tensor run_experts(const InferenceCall& call, const RoutingPlanCall& plan, const Tensor& token_offsets) {
  const Arguments args{call.x, call.gate_weights, call.up_proj, call.down_proj, call.up_bias, call.down_bias,
                       plan.expert_offsets, plan.row_to_token, plan.row_to_slot, token_offsets, plan.token_rows,
                       std::nullopt, {}, call.activation, call.gated, parse_gate_on(call.gate_weight_on), 0, 0,
                       call.residual, call.gate_proj, false};
  Tensor y = torch::stable::new_empty(call.x, {call.x.size(0), call.x.size(1)});
  dispatch(args, [&](auto zero) { forward<decltype(zero)>(args, out<decltype(zero)>(y), nullptr); });
  return y;
}

}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&dmoe::moe_mlp<false>));
  m.impl("moe_mlp_inference", TORCH_BOX(&dmoe::moe_mlp_inference<false>));
  m.impl("moe_mlp_backward", TORCH_BOX(&dmoe::moe_mlp_backward<false>));
  m.impl("moe_mlp_invariant", TORCH_BOX(&dmoe::moe_mlp<true>));
  m.impl("moe_mlp_invariant_inference", TORCH_BOX(&dmoe::moe_mlp_inference<true>));
  m.impl("moe_mlp_invariant_backward", TORCH_BOX(&dmoe::moe_mlp_backward<true>));
  m.impl("moe_mlp_backward_data", TORCH_BOX(&dmoe::moe_mlp_backward_data));
}
