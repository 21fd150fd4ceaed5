// Random bits in registers: those of random.h, for several counters at once. Included inside the
// ISA's namespace.
#pragma once

#include "numeric/random.h"
#include "numeric/vec.h"

// Philox for as many counters as there are lanes of 64 bits; only the lower half of each counts.
typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
constexpr int kCounters = kVectorBytes / 8;
constexpr int kRandomTile = kCounters / kCountersOfBlock * kRandomBlock;

FUSEDOPT_FN Wide multiply_lower_halves(Wide a, Wide b) {
#if defined(__AVX512F__)
  return bit_cast<Wide>(_mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Wide>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<Wide>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The 16 bits of the elements of kCounters / kCountersOfBlock blocks, from lanes a0 b0 a1 b1 ...
FUSEDOPT_FN void store_random(Wide a, Wide b, uint16_t* to) {
#if defined(__AVX512F__)
  const __m512i lower = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const __m512i upper = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  const auto x = bit_cast<__m512i>(a), y = bit_cast<__m512i>(b);
  const __m512i all[] = {_mm512_permutex2var_epi64(x, lower, y),
                         _mm512_permutex2var_epi64(x, upper, y)};
#elif defined(__AVX2__)
  const auto x = bit_cast<__m256i>(a), y = bit_cast<__m256i>(b);
  const __m256i even = _mm256_unpacklo_epi64(x, y), odd = _mm256_unpackhi_epi64(x, y);
  const __m256i all[] = {_mm256_permute2x128_si256(even, odd, 0x20),
                         _mm256_permute2x128_si256(even, odd, 0x31)};
#else
  uint64_t all[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    all[2 * i] = a[i];
    all[2 * i + 1] = b[i];
  }
#endif
  // 16 halves a block, in registers that every instruction set has.
  constexpr int kPart = kVectorBytes < 32 ? kVectorBytes / 2 : 16;
  typedef uint16_t Part __attribute__((vector_size(2 * kPart)));
  for (int i = 0; i < static_cast<int>(sizeof(all)) / 2; i += kPart) {
    Part halves;
    std::memcpy(&halves, reinterpret_cast<const char*>(all) + 2 * i, sizeof(halves));
    const Part swapped = bits_for_unsigned(halves);
    uint16_t* const block = to + i / 16 * kRandomBlock + i % 16;
    std::memcpy(block, &halves, sizeof(halves));
    std::memcpy(block + kRandomBlock / 2, &swapped, sizeof(swapped));
  }
}

// The random bits of one key in one draw.
struct RandomBits {
  Wide keys[kPhiloxRounds];  // of each round; the others are the same for all
  uint32_t draw;

  RandomBits(uint32_t key, uint32_t draw) : draw(draw) {
    for (Wide& each : keys) {
      each = Wide{} + uint64_t{key};
      key += kPhiloxWeyl[0];
    }
  }

  // Of kRandomTile elements from number `block` of the blocks on.
  FUSEDOPT_FN void operator()(uint64_t block, uint16_t* to) const {
    const Wide zero{};
    Wide x0 = zero;
    for (int i = 0; i < kCounters; ++i) x0[i] = static_cast<uint64_t>(i);
    x0 += block * kCountersOfBlock;
    Wide x1 = x0 >> 32, x2 = zero + draw, x3 = zero;
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      const Wide a = multiply_lower_halves(x0, zero + kPhiloxMultipliers[0]);
      const Wide b = multiply_lower_halves(x2, zero + kPhiloxMultipliers[1]);
      x0 = (b >> 32) ^ x1 ^ keys[round];
      x1 = b;
      x2 = (a >> 32) ^ x3 ^ (zero + uint64_t{round * kPhiloxWeyl[1]});
      x3 = a;
    }
    store_random((x0 & 0xffffffff) | x1 << 32, (x2 & 0xffffffff) | x3 << 32, to);
  }
};
