// Random bits that come of numbers alone, whoever asks for them and in whatever order: Philox4x32-7
// (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Included inside a back end's
// namespace. Readable spec: python/fusedopt/_codecs.py

#pragma once

constexpr uint32_t kPhiloxMultipliers[] = {0xd2511f53, 0xcd9e8d57};
constexpr uint32_t kPhiloxWeyl[] = {0x9e3779b9, 0xbb67ae85};
constexpr int kPhiloxRounds = 7;

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

// 128 bits, for eight elements: of the block's first and third eight, or of the others.
struct RandomWords {
  uint32_t words[4];
};
FUSEDOPT_FN RandomWords random_words(uint64_t counter, uint32_t draw, uint32_t key) {
  constexpr uint64_t kFirst = kPhiloxMultipliers[0], kSecond = kPhiloxMultipliers[1];
  constexpr uint32_t kWeyl0 = kPhiloxWeyl[0], kWeyl1 = kPhiloxWeyl[1];
  auto x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32);
  uint32_t x2 = draw, x3 = 0;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = kFirst * x0, b = kSecond * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ (key + round * kWeyl0);
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ round * kWeyl1;
    x3 = static_cast<uint32_t>(a);
  }
  return {{x0, x1, x2, x3}};
}

// The bits of an element, by its number in the parameter: which are asked for, and which half of
// them is its own.
FUSEDOPT_FN uint64_t counter_of(uint64_t element) {
  return element / kRandomBlock * kCountersOfBlock + element % 16 / 8;
}
FUSEDOPT_FN uint32_t random_half(const RandomWords& random, int i, bool is_swapped) {
  const uint32_t* const words = random.words;
  const uint32_t word = i < 2 ? words[0] : i < 4 ? words[1] : i < 6 ? words[2] : words[3];
  const uint32_t half = word >> (i % 2 * 16) & 0xffff;
  return is_swapped ? bits_for_unsigned(half) : half;
}
