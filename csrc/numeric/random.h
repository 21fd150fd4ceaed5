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
