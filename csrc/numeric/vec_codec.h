// The codecs that take a second array or random bits, for the lanes of two registers: the same
// conversions, bit for bit, as those of single elements in codec.h and blocks.h, but for what is
// rare: is_rare() says so, and then they must not be used. Included inside the ISA's namespace.
#pragma once

#include "numeric/blocks.h"
#include "numeric/vec16.h"
#include "numeric/vec_random.h"

// ---- parameters ---------------------------------------------------------------------------------

// (A remainder below zero has taken one from the upper half.)
FUSEDOPT_FN Words add_remainder(Words both) { return both - ((both & 0x8000) << 1); }
FUSEDOPT_FN Words split_remainder(Words bits) { return bits + ((bits & 0x8000) << 1); }

FUSEDOPT_FN BFloat16Vec load_split(const void* data, const void* remainder) {
  const Halves upper = load_halves(data), lower = load_halves(remainder);
  return {floats_of(add_remainder(widen_a(lower, upper))),
          floats_of(add_remainder(widen_b(lower, upper)))};
}

FUSEDOPT_FN void store_split(BFloat16Vec x, void* data, void* remainder) {
  const Words a = bits_of(x.a), b = bits_of(x.b);
  store_halves(upper_halves(split_remainder(a), split_remainder(b)), data);
  store_halves(lower_halves(a, b), remainder);
}

// NaN is rare, also as what comes of a 0 or an infinity that someone else has written.
FUSEDOPT_FN Ints is_nan(BFloat16Vec x) {
  return (x.a.lanes != x.a.lanes) | (x.b.lanes != x.b.lanes);
}

FUSEDOPT_FN void store_at_random(BFloat16Vec x, Halves random, void* data) {
  const Halves bits = bits_for_parameter(random);
  store_halves(
      upper_halves(bits_of(x.a) + widen_a(bits, Halves{}), bits_of(x.b) + widen_b(bits, Halves{})),
      data);
}

// ---- blocks -------------------------------------------------------------------------------------

constexpr int kInBlock = kBlock / BFloat16Vec::kLanes;

FUSEDOPT_FN int32_t largest_lane(Ints x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256i parts[2];
  std::memcpy(parts, &x, sizeof(x));
  const __m256i all = _mm256_max_epi32(parts[0], parts[1]);
#else
  const __m256i all = bit_cast<__m256i>(x);
#endif
  __m128i some = _mm_max_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  some = _mm_max_epi32(some, _mm_shuffle_epi32(some, 0x4e));
  some = _mm_max_epi32(some, _mm_shuffle_epi32(some, 0xb1));
  return _mm_cvtsi128_si32(some);
#else
  int32_t largest = x[0];
  for (int i = 1; i < kVectorBytes / 4; ++i) largest = largest > x[i] ? largest : x[i];
  return largest;
#endif
}
FUSEDOPT_FN bool any_lane(Ints mask) {
#if defined(__AVX512F__)
  __m256i parts[2];
  std::memcpy(parts, &mask, sizeof(mask));
  const __m256i all = _mm256_or_si256(parts[0], parts[1]);
  return !_mm256_testz_si256(all, all);
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  int32_t any = 0;
  for (int i = 0; i < kVectorBytes / 4; ++i) any |= mask[i];
  return any != 0;
#endif
}

// The two factors of codec's are one here, as long as that is a normal number.
template <class Code>
constexpr int kLargestScale = 253 - Code::kBias;

FUSEDOPT_FN Ints larger(Ints a, Ints b) { return a > b ? a : b; }
FUSEDOPT_FN Ints magnitude(Vec<float> x) { return bit_cast<Ints>(bits_of(x) & 0x7fffffff); }

// A block in registers, or what a kernel is to keep of it.
template <class Code>
struct Block {
  BFloat16Vec lanes[kInBlock];

  // False if it has NaN or too large a scale.
  FUSEDOPT_FN bool load(const uint8_t* codes, uint8_t scale) {
    const bool fits = scale <= kLargestScale<Code>;
    const Vec<float> up =
        Vec<float>{} + normal_power_of_two((fits ? scale : 0) - 127 + Code::kBias);
    Halves nan{};
    for (int i = 0; i < kInBlock; ++i) {
      // The code's magnitude where a float has the upper digits of its own, and the sign.
      const Halves code = Code::kSigned ? load_signed_bytes(codes + i * BFloat16Vec::kLanes)
                                        : load_bytes(codes + i * BFloat16Vec::kLanes);
      const Halves upper = Code::kSigned ? code << 4 & 0x87f0 : Halves(code << 4);
      nan |= bit_cast<Halves>((Code::kSigned ? code | 0xff80 : code | 0xff00) == 0xffff);
      lanes[i] = {floats_of(widen_a(Halves{}, upper)) * up,
                  floats_of(widen_b(Halves{}, upper)) * up};
    }
    return fits && !any_lane(bit_cast<Ints>(nan));
  }

  FUSEDOPT_FN static Block from_memory(const float* from) {
    Block block;
    for (BFloat16Vec& x : block.lanes) {
      x = load_in_halves(from);
      from += BFloat16Vec::kLanes;
    }
    return block;
  }
  FUSEDOPT_FN void to_memory(float* to) const {
    for (const BFloat16Vec& x : lanes) {
      store_in_halves(x, to);
      to += BFloat16Vec::kLanes;
    }
  }

  FUSEDOPT_FN uint32_t largest() const {
    Ints most{};
    for (const BFloat16Vec& x : lanes) {
      most = larger(most, larger(magnitude(x.a), magnitude(x.b)));
    }
    return static_cast<uint32_t>(largest_lane(most));
  }
  // For what largest() is; store() takes the others.
  FUSEDOPT_FN static bool is_rare(uint32_t largest) {
    return static_cast<int>(largest >> 23) > kLargestScale<Code> + Code::kHeadroom;
  }

  FUSEDOPT_FN void store(uint32_t largest, const uint16_t* random, uint8_t* codes,
                         uint8_t* scale) const {
    *scale = static_cast<uint8_t>(scale_of<Code>(largest));
    const Vec<float> down = Vec<float>{} + normal_power_of_two(127 - *scale - Code::kBias);
    for (int i = 0; i < kInBlock; ++i) {
      const Halves bits = bits_for<Code>(load_halves(random + i * BFloat16Vec::kLanes));
      const Halves half = Halves{} + 0x8000;
      const auto round = [&](Vec<float> x, Words bits) { return bits_of(x * down) + (bits >> 12); };
      const Halves upper = upper_halves(round(lanes[i].a, widen_a(half, bits)),
                                        round(lanes[i].b, widen_b(half, bits)));
      store_bytes(
          Code::kSigned ? (upper >> 4 & 0x7f) | (upper >> 8 & 0x80) : Halves(upper >> 4 & 0xff),
          codes + i * BFloat16Vec::kLanes);
    }
  }
};
