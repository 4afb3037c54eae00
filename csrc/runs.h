// A sequence cut into one run per thread, for algorithms that visit it twice and need the same cut both times.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace dmoe {

class Runs {
 public:
  // `shortest`: the length of a run that repays waking a thread.
  Runs(int64_t size, int64_t shortest)
      : size_(size),
        count_(std::clamp<int64_t>(std::min<int64_t>(torch::stable::get_num_threads(), size / shortest), 1, 256)) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t run) const { return size_ / count_ * run + std::min(run, size_ % count_); }
  int64_t end(int64_t run) const { return begin(run + 1); }

  // body(run, begin, end) for every run, on as many threads as there are; it must not throw.
  template <typename Body>
  void for_each(const Body& body) const {
    if (count_ == 1) return body(int64_t{0}, int64_t{0}, size_);
    torch::stable::parallel_for(0, count_, 1, [&](int64_t from, int64_t to) {
      for (int64_t run = from; run < to; ++run) body(run, begin(run), end(run));
    });
  }

 private:
  int64_t size_, count_;
};

}  // namespace dmoe
