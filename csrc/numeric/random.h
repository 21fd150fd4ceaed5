// Random bits that come of numbers alone, whoever asks for them and in whatever order: Philox4x32-7
// (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Included inside a back end's
// namespace. Readable spec: python/fusedopt/_codecs.py

#pragma once

struct Words4 {
  uint32_t words[4];
};

constexpr uint32_t kPhiloxMultipliers[] = {0xd2511f53, 0xcd9e8d57};
constexpr uint32_t kPhiloxWeyl[] = {0x9e3779b9, 0xbb67ae85};
constexpr int kPhiloxRounds = 7;

// 128 bits, number `counter` of those that a key has for draw `draw`.
FUSEDOPT_FN Words4 philox(uint64_t counter, uint32_t draw, uint32_t key) {
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32);
  uint32_t x2 = draw, x3 = 0, k0 = key, k1 = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t{kPhiloxMultipliers[0]} * x0;
    const uint64_t b = uint64_t{kPhiloxMultipliers[1]} * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(a);
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
  return {{x0, x1, x2, x3}};
}

// 32 elements share 256 bits, 16 halves of words: of an element and the one 16 after it, one has
// the bytes of a half in the one order and one in the other. And what is rounded at the same time
// takes an element's 16 bits in another order. So one rounding says next to nothing of another.
constexpr int kRandomBlock = 32;
constexpr int kCountersOfBlock = 2;
// Halves is uint32_t, or a vector of 16-bit numbers.
template <class Halves>
FUSEDOPT_FN Halves bits_for_signed(Halves u) {
  return u;
}
template <class Halves>
FUSEDOPT_FN Halves bits_for_unsigned(Halves u) {
  return (u >> 8) | (u << 8 & 0xff00);
}
template <class Halves>
FUSEDOPT_FN Halves bits_for_parameter(Halves u) {
  return u ^ (u << 9 & 0xfe00);
}
