// Philox4x32-10 (Salmon et al. 2011): the twin of dmoe/ops/philox.py, bit for bit.
#pragma once

#include <cstdint>

namespace dmoe {

enum Stream : uint32_t { kActivationDropout = 0, kExpertDropout = 1, kInputJitter = 2 };

// The 4 words of columns 4 * quad .. 4 * quad + 3 of a row.
inline void philox(uint64_t seed, uint32_t row, uint32_t quad, uint32_t stream, uint32_t out[4]) {
  uint32_t c0 = quad, c1 = row, c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// scale[c] = 0 with probability p, else 1 / (1 - p), for the columns [0, width) of a row.
template <typename A>
void dropout_row(uint64_t seed, uint32_t row, uint32_t stream, double p, int64_t width, A* scale) {
  const auto threshold = static_cast<uint64_t>(__builtin_nearbyint(p * 4294967296.0));
  const A kept = static_cast<A>(1.0 / (1.0 - p));
  uint32_t words[4];
  for (int64_t column = 0; column < width; ++column) {
    if (column % 4 == 0) philox(seed, row, static_cast<uint32_t>(column / 4), stream, words);
    scale[column] = words[column % 4] >= threshold ? kept : A(0);
  }
}

}  // namespace dmoe
