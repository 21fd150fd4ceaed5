// Elements of eight bits, in blocks of 32 with one power of two as their scale: E4M3 with a sign,
// which makes a block one of OCP's MXFP8 format, and E5M3 without. The scale is such that the
// largest element has one more power of two above it: it may be rounded up, and nothing saturates.
// Rounding is stochastic: to nearest, an average would stick where its steps are shorter than half
// a digit. Included inside a back end's namespace. Readable spec: python/fusedopt/_codecs.py

#pragma once

#include "numeric/codec.h"
#include "numeric/random.h"

struct E4M3 {
  static constexpr int kBias = 120;    // of a float's exponent over the code's
  static constexpr int kHeadroom = 7;  // the power of two in which the largest element lies
  static constexpr bool kSigned = true;
};
struct E5M3 {
  static constexpr int kBias = 112;
  static constexpr int kHeadroom = 15;
  static constexpr bool kSigned = false;
};

template <class Code, class Words>
FUSEDOPT_FN Words bits_for(Words random) {
  return Code::kSigned ? bits_for_signed(random) : bits_for_unsigned(random);
}

constexpr int kDroppedBits = 20;  // of a float's 23 digits, all but three

// 2^exponent as a float, and as one that may be subnormal.
FUSEDOPT_FN float normal_power_of_two(int exponent) {
  return bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}
FUSEDOPT_FN float power_of_two(int exponent) {
  return exponent > -127 ? normal_power_of_two(exponent)
                         : bit_cast<float>(0x00400000u >> (-127 - exponent));
}

// What a block's scale is found from: the bits of the largest finite magnitude.
FUSEDOPT_FN uint32_t finite_magnitude(float x) {
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffff;
  return magnitude < 0x7f800000 ? magnitude : 0;
}

template <class Code>
FUSEDOPT_FN int scale_of(uint32_t largest_magnitude) {
  const int exponent = static_cast<int>(largest_magnitude >> 23) - Code::kHeadroom;
  return exponent > 0 ? exponent : 0;
}

// A code, with an element's 16 random bits; `down` is power_of_two(127 - scale).
template <class Code>
FUSEDOPT_FN uint8_t encode(float x, float down, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const float scaled = bit_cast<float>(magnitude) * down * power_of_two(-Code::kBias);
  const uint32_t rounded =
      (bit_cast<uint32_t>(scaled) + (bits_for<Code>(random) << 4) + 8) >> kDroppedBits;
  const uint32_t nan = Code::kSigned ? 0x7f : 0xff;
  const uint32_t code = magnitude < 0x7f800000 ? rounded : nan;
  return static_cast<uint8_t>(Code::kSigned ? code | (bits >> 24 & 0x80) : code);
}

// The element; `up` is power_of_two(scale - 127).
template <class Code>
FUSEDOPT_FN float decode(uint8_t code, float up) {
  const uint32_t magnitude = Code::kSigned ? code & 0x7f : code;
  const float size = bit_cast<float>(magnitude << kDroppedBits) * power_of_two(Code::kBias) * up;
  const uint32_t nan = Code::kSigned ? 0x7f : 0xff;
  const uint32_t sign = Code::kSigned ? uint32_t{code} << 24 & 0x80000000 : 0;
  return bit_cast<float>(magnitude == nan ? 0x7fc00000 : bit_cast<uint32_t>(size) | sign);
}
