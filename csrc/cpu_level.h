// Which of several kernels in one library the processor runs.
//
// Who decides is the processor, asked once; ATEN_CPU_CAPABILITY (PyTorch's) and ONEDNN_MAX_CPU_ISA or DNNL_MAX_CPU_ISA
// (oneDNN's) lower the level here as they do there, so that one machine shows what others do.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "few_rows_lanes.h"

namespace dmoe {
namespace few {

enum class Level { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

inline bool is_one_of(const char* value, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    if (value != nullptr && std::strcmp(value, name) == 0) return true;
  }
  return false;
}

inline Level find_level() {
  Level level = Level::kPortable;
#ifdef DMOE_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v3")) level = Level::kAvx2;
  if (__builtin_cpu_supports("x86-64-v4")) level = Level::kAvx512;
  if (level == Level::kAvx512 && __builtin_cpu_supports("avx512bf16")) level = Level::kAvx512Bf16;
  const char *aten = std::getenv("ATEN_CPU_CAPABILITY"), *onednn = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (onednn == nullptr) onednn = std::getenv("DNNL_MAX_CPU_ISA");
  if (is_one_of(onednn, {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})) {
    level = std::min(level, Level::kAvx512);
  }
  if (is_one_of(aten, {"avx2"})) level = std::min(level, Level::kAvx2);
  if (is_one_of(aten, {"default"})) level = Level::kPortable;
#endif
  return level;
}
inline Level level() {
  static const Level found = find_level();
  return found;
}

}  // namespace few
}  // namespace dmoe
