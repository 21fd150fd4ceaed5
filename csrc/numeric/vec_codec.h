// The codecs that take a second array or random bits, for the lanes of two registers: the same
// conversions, bit for bit, as those of single elements in codec.h and blocks.h, but for what is
// rare: is_rare() says so, and then they must not be used. Included inside the ISA's namespace.
#pragma once

#include "numeric/blocks.h"
#include "numeric/vec16.h"
#include "numeric/vec_random.h"

// ---- parameters ---------------------------------------------------------------------------------

// The remainder has a sign: with 2^15 more it has none, and may stand below the upper half.
FUSEDOPT_FN BFloat16Vec load_split(const void* data, const void* remainder) {
  const Halves upper = load_halves(data), lower = load_halves(remainder) ^ 0x8000;
  return {floats_of(widen_a(lower, upper) - 0x8000), floats_of(widen_b(lower, upper) - 0x8000)};
}

FUSEDOPT_FN void store_split(BFloat16Vec x, void* data, void* remainder) {
  const Words a = bits_of(x.a), b = bits_of(x.b);
  store_halves(upper_halves(a + 0x8000, b + 0x8000), data);
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

FUSEDOPT_FN uint32_t largest_lane(Words x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256i parts[2];
  std::memcpy(parts, &x, sizeof(x));
  const __m256i all = _mm256_max_epu32(parts[0], parts[1]);
#else
  const __m256i all = bit_cast<__m256i>(x);
#endif
  __m128i some = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  some = _mm_max_epu32(some, _mm_shuffle_epi32(some, 0x4e));
  some = _mm_max_epu32(some, _mm_shuffle_epi32(some, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(some));
#else
  uint32_t largest = x[0];
  for (int i = 1; i < kVectorBytes / 4; ++i) largest = largest > x[i] ? largest : x[i];
  return largest;
#endif
}

// Whether any of a block's 32 codes, with those bits set, is 0xff.
FUSEDOPT_FN bool any_is_0xff(const uint8_t* codes, uint8_t set) {
  typedef uint8_t Codes __attribute__((vector_size(kBlock)));
  Codes all;
  std::memcpy(&all, codes, sizeof(all));
  const auto mask = (all | set) == 0xff;
#if defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  uint64_t parts[4];
  std::memcpy(parts, &mask, sizeof(parts));
  return (parts[0] | parts[1] | parts[2] | parts[3]) != 0;
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

// The bytes of a block, from halves that have them below nothing else.
FUSEDOPT_FN void store_codes(const Halves* x, uint8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i codes = _mm256_permute4x64_epi64(
      _mm256_packus_epi16(bit_cast<__m256i>(x[0]), bit_cast<__m256i>(x[1])), 0xd8);
  std::memcpy(to, &codes, sizeof(codes));
#else
  for (int i = 0; i < kInBlock; ++i) store_bytes(x[i], to + i * BFloat16Vec::kLanes);
#endif
}

// From halves that have seven bits and, as their own sign, the eighth.
FUSEDOPT_FN void store_signed_codes(const Halves* x, uint8_t* to) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Saturated, a number below zero is its sign, and no other has more bits than without.
  const Halves a = x[0] & 0x7f, b = x[1] & 0x7f;
  const __m256i codes = _mm256_permute4x64_epi64(
      _mm256_packus_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)) |
          _mm256_packs_epi16(bit_cast<__m256i>(x[0]), bit_cast<__m256i>(x[1])),
      0xd8);
  std::memcpy(to, &codes, sizeof(codes));
#else
  Halves codes[kInBlock];
  for (int i = 0; i < kInBlock; ++i) codes[i] = (x[i] & 0x7f) | (x[i] >> 8 & 0x80);
  store_codes(codes, to);
#endif
}

#if defined(__AVX512F__)
FUSEDOPT_FN Words other_half(Words x) {
  const auto all = bit_cast<__m512i>(x);
  return bit_cast<Words>(_mm512_maskz_shuffle_i64x2(0xff, all, all, 0x4e));
}
#endif

// The random bits of a block, each where it is added to the digits that are dropped.
struct BlockBits {
  Words a[kInBlock], b[kInBlock];

  template <class Code>
  FUSEDOPT_FN static BlockBits load(const uint16_t* random) {
    BlockBits all;
    for (int i = 0; i < kInBlock; ++i) {
      const Halves bits = bits_for<Code>(load_halves(random + i * BFloat16Vec::kLanes));
      const Halves half = Halves{} + 0x8000;
      all.a[i] = widen_a(half, bits) >> (32 - kDroppedBits);
      all.b[i] = widen_b(half, bits) >> (32 - kDroppedBits);
    }
    return all;
  }
  // Those for the other code, of a block with which 32 elements' bits begin: what the one has for
  // an element, the other has for the one 16 away.
  FUSEDOPT_FN BlockBits for_other_code() const {
    BlockBits all;
    for (int i = 0; i < kInBlock; ++i) {
#if defined(__AVX512F__)
      all.a[i] = other_half(a[i]);
      all.b[i] = other_half(b[i]);
#else
      all.a[i] = a[(i + kInBlock / 2) % kInBlock];
      all.b[i] = b[(i + kInBlock / 2) % kInBlock];
#endif
    }
    return all;
  }
};

// The two factors of codec's are one here, as long as that is a normal number.
template <class Code>
constexpr int kLargestScale = 253 - Code::kBias;

FUSEDOPT_FN Words larger(Words a, Words b) { return a > b ? a : b; }

FUSEDOPT_FN Vec<float> all_lanes(int exponent) {  // a normal power of two
  return floats_of(Words{} + (static_cast<uint32_t>(exponent + 127) << 23));
}

// A block in registers, or what a kernel is to keep of it.
template <class Code>
struct Block {
  BFloat16Vec lanes[kInBlock];

  // False if it has NaN or too large a scale.
  FUSEDOPT_FN bool load(const uint8_t* codes, uint8_t scale) {
    const bool fits = scale <= kLargestScale<Code>;
    const Vec<float> up = all_lanes((fits ? scale : 0) - 127 + Code::kBias);
    for (int i = 0; i < kInBlock; ++i) {
      // The code's magnitude where a float has the upper digits of its own, and the sign.
      const Halves code = Code::kSigned ? load_signed_bytes(codes + i * BFloat16Vec::kLanes)
                                        : load_bytes(codes + i * BFloat16Vec::kLanes);
      const Halves upper = Code::kSigned ? code << 4 & 0x87f0 : Halves(code << 4);
      lanes[i] = {floats_of(widen_a(Halves{}, upper)) * up,
                  floats_of(widen_b(Halves{}, upper)) * up};
    }
    return fits & !any_is_0xff(codes, Code::kSigned ? 0x80 : 0);
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
    // Without a sign, a number below zero is larger than all others, and rare.
    constexpr uint32_t kMagnitude = Code::kSigned ? 0x7fffffff : 0xffffffff;
    Words most{};
    for (const BFloat16Vec& x : lanes) {
      const Words in_pair = larger(bits_of(x.a) & kMagnitude, bits_of(x.b) & kMagnitude);
      most = &x == lanes ? in_pair : larger(most, in_pair);
    }
    return largest_lane(most);
  }
  // For what largest() is; store() takes the others.
  FUSEDOPT_FN static bool is_rare(uint32_t largest) {
    return static_cast<int>(largest >> 23) > kLargestScale<Code> + Code::kHeadroom;
  }

  FUSEDOPT_FN void store(uint32_t largest, const BlockBits& random, uint8_t* codes,
                         uint8_t* scale) const {
    const int found = scale_of<Code>(largest);
    *scale = static_cast<uint8_t>(found);
    const Vec<float> down = all_lanes(127 - found - Code::kBias);
    Halves shifted[kInBlock];
    for (int i = 0; i < kInBlock; ++i) {
      const auto a = bit_cast<Ints>(bits_of(lanes[i].a * down) + random.a[i]);
      const auto b = bit_cast<Ints>(bits_of(lanes[i].b * down) + random.b[i]);
      shifted[i] = halves_of(a >> kDroppedBits, b >> kDroppedBits);
    }
    Code::kSigned ? store_signed_codes(shifted, codes) : store_codes(shifted, codes);
  }
};
