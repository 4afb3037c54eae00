// Dense products inside a threaded operation on the CPU: one task, one thread, one call into PyTorch's own GEMM.
//
// What is here
//   parallel_tasks(n, fn)    runs fn(task) for every task in [0, n), tasks handed out one at a time to the threads of
//                            PyTorch's pool. A product inside runs on one thread: see "Who cuts a product".
//   Matrix, row_major(), transposed(), mm_out()     out = a @ b, or out += a @ b, on raw pointers with strides.
//   round_up_rows(), Scratch                        see "Shapes in bfloat16".
//
// Who cuts a product. A library that shares one product among threads adds it up in an order that depends on how many
// there are, and MKL even plans for threads that it then does not get: in a parallel region PyTorch leaves the number
// of its caller to one thread and the machine's to the others, so bits depended on who took which task. So every
// product is one task here, cut by shape alone, and every library is told that it has one thread: oneDNN and BLAS
// libraries on OpenMP by a parallel region around them, MKL by its own switch. Where rows make too few tasks (one
// expert, a handful of tokens), the columns of the output are cut as well: see column_width().
//
// What a call costs beyond its arithmetic: see the figures at mm_out. Blocks of 64 rows or more make it disappear; a
// product of a handful of rows is dominated by it, and by what follows: few_rows.h has kernels for those.
//
// Shapes in bfloat16. PyTorch sends bfloat16 (and, where the CPU has the instructions, float16) to oneDNN, which
// generates code for each (m, n, k, strides) it meets: 1.8 to 2.4 ms each on a Zen 5 core at 2.6 GHz, twenty times the
// product itself at m = 128, n = k = 512, kept in a cache of 1024 entries. The rows per expert change at every step,
// so products of exactly those rows would pay it again and again. Use row blocks of one fixed size, and round the last
// block of an expert up with round_up_rows(): a product then has a handful of different shapes in its life.
// float32 and float64 go to the BLAS library, which has no such cost, and round_up_rows() leaves them alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>

#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"

namespace dmoe {
namespace detail {

// While it lives, MKL calls of this thread run on this thread alone. Nothing where PyTorch has no MKL.
class OneMklThread {
 public:
  OneMklThread() : previous_(set(1)) {}
  ~OneMklThread() { set(previous_); }  // 0, where this thread had no number of its own
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  // MKL's own function, which libtorch_cpu exports; it returns what was set before.
  static int set(int threads) {
    using Setter = int (*)(int);
    static const Setter setter = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return setter == nullptr ? 0 : setter(threads);
  }

  int previous_;
};

}  // namespace detail

// Runs fn(task) once for each task in [0, num_tasks), in no particular order, on PyTorch's threads. A free thread takes
// the next task, so tasks may differ in size; put the large ones first. Each task must write its own memory only.
//
// A task may throw: the tasks not yet begun are then left out, and the first exception is thrown again here, once every
// thread is back. (An exception that leaves a parallel region would end the process.)
//
// A product inside runs on one thread, also when it is the only task. Called inside another parallel region everything
// runs there, on one thread.
template <typename Function>
void parallel_tasks(int64_t num_tasks, const Function& fn) {
  if (num_tasks <= 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto worker = [&](int64_t, int64_t) {
    const detail::OneMklThread one_thread;
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      try {
        fn(task);
      } catch (...) {
        // Only the first to set the flag writes `error`; the end of the parallel region publishes it to the caller.
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  };
  // Two at least: a loop of one would run outside of a parallel region.
  const int64_t workers = std::max<int64_t>(2, std::min<int64_t>(num_tasks, torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, workers, 1, worker);
  if (error) std::rethrow_exception(error);
}

// A matrix in someone else's memory. Strides count elements. One of the two strides must be 1 for a fast product.
struct Matrix {
  void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

// Element (row, column) of a matrix of T.
template <typename T>
inline const T* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row_stride + column * m.col_stride;
}

// (rows, cols) with `row_stride` elements from one row to the next; the data is written only where the matrix is `out`.
inline Matrix row_major(const void* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {const_cast<void*>(data), rows, cols, row_stride, 1};
}

inline Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.cols, matrix.rows, matrix.col_stride, matrix.row_stride};
}

namespace detail {

// A tensor on a matrix's memory, for one call.
class Handle {
 public:
  Handle(const Matrix& matrix, int32_t dtype) {
    const int64_t sizes[] = {matrix.rows, matrix.cols};
    const int64_t strides[] = {matrix.row_stride, matrix.col_stride};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
        matrix.data, 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0, &tensor_,
        aoti_torch_layout_strided(), nullptr, 0));
  }
  ~Handle() { aoti_torch_delete_tensor_object(tensor_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  AtenTensorHandle get() const { return tensor_; }

 private:
  AtenTensorHandle tensor_;
};

}  // namespace detail

// Columns [begin, end) of a matrix whose elements take `item` bytes.
inline Matrix columns_of(const Matrix& matrix, int64_t begin, int64_t end, int64_t item) {
  auto* data = static_cast<char*>(matrix.data) + begin * matrix.col_stride * item;
  return {data, matrix.rows, end - begin, matrix.row_stride, matrix.col_stride};
}

// How wide to cut the `columns` columns of a task's product, of `rows` rows that are sums over `inner`, where all tasks
// of the pass together have `all_rows` rows: halved until a piece is at most an eighth of the pass, as long as it keeps
// the work that pays for a call and for packing its factors once more. A multiple of 16, or all columns.
//
// Halves only: oneDNN generates code for each width. Products of fewer than 8 rows cost the reading of their weight.
inline int64_t column_width(int64_t rows, int64_t all_rows, int64_t inner, int64_t columns) {
  constexpr int64_t kShare = 8, kNarrowest = 64, kLeast = 512 * 1024;  // multiply-adds
  const int64_t work = std::max<int64_t>(rows, 8) * inner;
  int64_t width = columns;
  while (width >= 2 * kNarrowest && work * width >= 2 * kLeast && rows * width * kShare > all_rows * columns) {
    width = (width / 2 + 15) / 16 * 16;
  }
  return width;
}

// out = a @ b, or out += a @ b with accumulate; all three of one dtype (float64, float32, bfloat16 or float16), sums in
// float32 or wider. `out` must not overlap a or b. Empty products are right: k = 0 gives zeros (or leaves `out` alone).
//
// bfloat16 and float16 round at every call, so a sum in several calls with accumulate loses what one call would keep.
//
// A call costs 0.6 us beyond the product itself (a 1 x 1 x 1 product, Zen 5 core at 2.6 GHz; torch.mm(out=) from Python
// costs 1.6 to 1.9). Through the dispatcher it was 0.9, and the dispatcher cannot be given addmm's Scalars.
//
// It goes below the dispatcher, so a worker thread, which inherits neither grad mode nor autocast from the caller,
// needs no guards, and no dispatch mode of the caller's thread sees it. Throws what PyTorch throws.
inline void mm_out(const Matrix& out, const Matrix& a, const Matrix& b, ScalarType dtype, bool accumulate = false) {
  if (out.rows == 0 || out.cols == 0 || (a.cols == 0 && accumulate)) return;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const detail::Handle out_handle(out, code), a_handle(a, code), b_handle(b, code);
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out_handle.get(), out_handle.get(), a_handle.get(), b_handle.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out_handle.get(), a_handle.get(), b_handle.get()));
  }
}

// How many rows to give a product that needs `rows`, where every new shape costs a code generation: the next multiple
// of 16 up to 256 rows, and 8 sizes for each doubling beyond, so at most an eighth more (below 128 rows: at most 15
// rows). float32 and float64 need no rounding. (oneDNN takes float16 only on some CPUs; the others multiply it so
// slowly that nothing is lost.)
//
// The added rows of `a` may hold anything, NaN included, as a row of a product depends on that row alone, and their
// results are not to be read. Where rows are summed over (a weight gradient) they must be zero in both factors.
inline int64_t round_up_rows(int64_t rows, ScalarType dtype) {
  const bool generates_code = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!generates_code) return rows;
  int64_t granule = 16;
  while (granule * 16 < rows) granule *= 2;
  return (rows + granule - 1) / granule * granule;
}

// Memory of one task, 64-byte aligned, kept and reused by the tasks of a thread. The contents are arbitrary.
class Scratch {
 public:
  // At least `bytes` bytes; valid until the next call on this object.
  void* get(size_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 63) / 64 * 64;
      memory_.reset();  // first, so that the two never exist together
      memory_.reset(::operator new(size_, std::align_val_t(64)));
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Delete> memory_;
  size_t size_ = 0;
};

}  // namespace dmoe
