// The measurement behind the choice, and the file that keeps it.
#include "product_choice.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <sstream>
#include <vector>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <torch/csrc/stable/library.h>

#include "blocked_gemm.h"
#include "check.h"
#include "cpu_level.h"
#include "gemm.h"
#include "simd.h"

namespace dmoe {
namespace {

// The library's way is taken where it is faster by more than this: below it the blocked one is better all the same, as
// no new shape costs it a code generation and no row is added, and noise never decides.
constexpr double kFasterBy = 1.25;

struct Shape {
  int64_t rows, inner, columns;
  bool columns_are_dense, transposed;  // of b, and a
};
// A projection's product with its weight as it is kept, the same backwards, and a weight gradient.
constexpr Shape kShapes[] = {{96, 256, 256, true, false}, {96, 256, 256, false, false}, {128, 96, 256, false, true}};
constexpr int kTurns = 5;

template <typename T>
ProductChoice measured(ScalarType dtype) {
  const auto seconds_of = [&](const Shape& shape, bool blocked) {
    std::vector<T> a(shape.rows * shape.inner, T(1.0f)), b(shape.inner * shape.columns, T(1.0f)), out(shape.rows * shape.columns);
    const Matrix left = shape.transposed ? transposed(row_major(a.data(), shape.inner, shape.rows, shape.rows))
                                         : row_major(a.data(), shape.rows, shape.inner, shape.inner);
    const Matrix right = shape.columns_are_dense
                             ? transposed(row_major(b.data(), shape.columns, shape.inner, shape.inner))
                             : row_major(b.data(), shape.inner, shape.columns, shape.columns);
    const Matrix result = row_major(out.data(), shape.rows, shape.columns, shape.columns);
    double best = 1e9;
    parallel_tasks(1, [&](int64_t) {  // on one thread, as all products of ours are
      for (int turn = 0; turn <= kTurns; ++turn) {  // the first generates code
        const auto start = std::chrono::steady_clock::now();
        blocked ? multiply_blocked(result, left, right, dtype) : mm_out(result, left, right, dtype);
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
      }
    });
    return best;
  };
  double ours = 0, library = 0, work = 0;
  for (const Shape& shape : kShapes) {
    ours += seconds_of(shape, true), library += seconds_of(shape, false);
    work += 2e-9 * shape.rows * shape.inner * shape.columns;
  }
  const auto told = [](double gflops) { return std::round(10 * gflops) / 10; };  // as the file has it
  return {ours <= kFasterBy * library, told(work / ours), told(work / library)};
}

ProductChoice measure(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return measured<float>(dtype);
    case ScalarType::BFloat16: return measured<BFloat16>(dtype);
    default: return measured<Half>(dtype);
  }
}

constexpr std::array<ScalarType, 3> kDtypes = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
constexpr std::array<const char*, 3> kNames = {"float32", "bfloat16", "float16"};

struct Cache {
  std::mutex mutex;
  std::string folder, versions;
  std::array<std::optional<ProductChoice>, 3> known;
};
Cache& cache() {
  static Cache here;
  return here;
}

// What the choice holds for: the first processor's lines that say what it is, and what lowers its level.
std::string machine() {
  std::ostringstream told;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line) && !line.empty();) {
    for (const char* key : {"vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features", "isa"}) {
      if (line.rfind(key, 0) == 0) told << line << '\n';
    }
  }
  for (const char* name : {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
                           "ONEDNN_DEFAULT_FPMATH_MODE"}) {
    const char* value = std::getenv(name);
    told << name << '=' << (value == nullptr ? "" : value) << '\n';
  }
  return told.str();
}

std::string path_of(const Cache& where) {
  uint64_t digest = 1469598103934665603u;  // FNV-1a
  for (const char c : machine() + where.versions) digest = (digest ^ static_cast<unsigned char>(c)) * 1099511628211u;
  char name[64];
  std::snprintf(name, sizeof(name), "/products-%016llx.txt", static_cast<unsigned long long>(digest));
  return where.folder + name;
}

// A line of the file: dtype, way, and both speeds. Anything else is passed over.
std::optional<ProductChoice> read(const std::string& path, const std::string& dtype) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name, way;
    ProductChoice found{};
    if (!(words >> name >> way >> found.blocked_gflops >> found.library_gflops) || name != dtype) continue;
    if (way != "blocked" && way != "library") continue;
    found.blocked = way == "blocked";
    return found;
  }
  return std::nullopt;
}

// The choice in the file, or else one that is measured now and written there.
ProductChoice kept(const Cache& where, size_t index) {
  const std::string path = path_of(where);
  std::error_code ignored;  // where nothing can be written, every process measures for itself
  std::filesystem::create_directories(where.folder, ignored);
  const int lock = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock < 0) return measure(kDtypes[index]);
  flock(lock, LOCK_EX);
  std::optional<ProductChoice> found = read(path, kNames[index]);
  if (!found) {
    found = measure(kDtypes[index]);
    std::ofstream(path, std::ios::app) << kNames[index] << (found->blocked ? " blocked " : " library ")
                                       << found->blocked_gflops << ' ' << found->library_gflops << '\n';
  }
  close(lock);  // and with it the lock
  return *found;
}

std::optional<ProductChoice> told() {
  const char* value = std::getenv("DMOE_CPU_PRODUCTS");
  if (value == nullptr || *value == '\0') return std::nullopt;
  const std::string way = value;
  DMOE_CHECK(way == "blocked" || way == "library", "products: DMOE_CPU_PRODUCTS: expected blocked or library, got ", way);
  return ProductChoice{way == "blocked", 0, 0};
}

ScalarType dtype_called(const char* op, const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return kDtypes[i];
  }
  fail(op, ": dtype: expected float32, bfloat16 or float16, got ", name);
}

// For dmoe.info(): the way, and both speeds in GFLOP/s of one thread (0 where nobody measured).
std::tuple<std::string, double, double> product_choice(std::string dtype) {
  const ProductChoice found = choice_of(dtype_called("product_choice", dtype));
  return {found.blocked ? "blocked" : "library", found.blocked_gflops, found.library_gflops};
}

}  // namespace

ProductChoice choice_of(ScalarType dtype) {
  if (dtype == ScalarType::Double) return {false, 0, 0};
  const size_t index = std::find(kDtypes.begin(), kDtypes.end(), dtype) - kDtypes.begin();
  static std::array<std::once_flag, 3> once;
  static std::array<ProductChoice, 3> found;
  std::call_once(once[index], [&] {
    Cache& where = cache();
    const std::lock_guard<std::mutex> guard(where.mutex);
    const std::optional<ProductChoice> given = told();
    found[index] = given ? *given : where.folder.empty() ? measure(dtype) : kept(where, index);
  });
  return found[index];
}

void set_product_cache(const std::string& folder, const std::string& versions) {
  Cache& where = cache();
  const std::lock_guard<std::mutex> guard(where.mutex);
  where.folder = folder, where.versions = versions;
}

}  // namespace dmoe

STABLE_TORCH_LIBRARY_IMPL(dmoe, CompositeExplicitAutograd, m) {
  m.impl("product_choice", TORCH_BOX(&dmoe::product_choice));
  m.impl("set_product_cache", TORCH_BOX(&dmoe::set_product_cache));
}
