// Sixteen-bit elements in registers: as many as fit a register of them are two registers of floats.
// Which of the two an element goes to does not matter, as long as it comes back to its place.
// Included inside the ISA's namespace.
#pragma once

#include "numeric/vec.h"

// ---- between 16 and 32 bits ---------------------------------------------------------------------

// widen_a and widen_b: the two registers, an element's upper half from x and its lower half from
// `low`; narrow is their inverse for lanes that are sign-extended 16-bit numbers.
#if defined(__AVX512F__)
typedef __m512i Bits;
FUSEDOPT_FN Bits widen_a(Bits low, Bits x) { return _mm512_unpacklo_epi16(low, x); }
FUSEDOPT_FN Bits widen_b(Bits low, Bits x) { return _mm512_unpackhi_epi16(low, x); }
FUSEDOPT_FN Bits narrow(Bits a, Bits b) { return _mm512_packs_epi32(a, b); }
#elif defined(__AVX2__)
typedef __m256i Bits;
FUSEDOPT_FN Bits widen_a(Bits low, Bits x) { return _mm256_unpacklo_epi16(low, x); }
FUSEDOPT_FN Bits widen_b(Bits low, Bits x) { return _mm256_unpackhi_epi16(low, x); }
FUSEDOPT_FN Bits narrow(Bits a, Bits b) { return _mm256_packs_epi32(a, b); }
#elif defined(__SSE2__)
typedef __m128i Bits;
FUSEDOPT_FN Bits widen_a(Bits low, Bits x) { return _mm_unpacklo_epi16(low, x); }
FUSEDOPT_FN Bits widen_b(Bits low, Bits x) { return _mm_unpackhi_epi16(low, x); }
FUSEDOPT_FN Bits narrow(Bits a, Bits b) { return _mm_packs_epi32(a, b); }
#elif defined(__aarch64__)
typedef uint16x8_t Bits;
FUSEDOPT_FN Bits widen_a(Bits low, Bits x) { return vzip1q_u16(low, x); }
FUSEDOPT_FN Bits widen_b(Bits low, Bits x) { return vzip2q_u16(low, x); }
FUSEDOPT_FN Bits narrow(Bits a, Bits b) { return vuzp1q_u16(a, b); }
#else
typedef uint16_t Bits __attribute__((vector_size(kVectorBytes)));
FUSEDOPT_FN Bits interleave_from(int first, Bits low, Bits x) {
  Bits both;
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    both[2 * i] = low[first + i];
    both[2 * i + 1] = x[first + i];
  }
  return both;
}
FUSEDOPT_FN Bits widen_a(Bits low, Bits x) { return interleave_from(0, low, x); }
FUSEDOPT_FN Bits widen_b(Bits low, Bits x) { return interleave_from(kVectorBytes / 4, low, x); }
FUSEDOPT_FN Bits narrow(Bits a, Bits b) {
  Bits lower;
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    lower[i] = a[2 * i];
    lower[kVectorBytes / 4 + i] = b[2 * i];
  }
  return lower;
}
#endif

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));

FUSEDOPT_FN Words widen_a(Halves low, Halves x) {
  return bit_cast<Words>(widen_a(bit_cast<Bits>(low), bit_cast<Bits>(x)));
}
FUSEDOPT_FN Words widen_b(Halves low, Halves x) {
  return bit_cast<Words>(widen_b(bit_cast<Bits>(low), bit_cast<Bits>(x)));
}
FUSEDOPT_FN Halves halves_of(Ints a, Ints b) {
  return bit_cast<Halves>(narrow(bit_cast<Bits>(a), bit_cast<Bits>(b)));
}
FUSEDOPT_FN Halves upper_halves(Words a, Words b) {
  return halves_of(bit_cast<Ints>(a) >> 16, bit_cast<Ints>(b) >> 16);
}
FUSEDOPT_FN Halves lower_halves(Words a, Words b) {
#if defined(__AVX512F__)
  return bit_cast<Halves>(
      _mm512_packus_epi32(bit_cast<Bits>(a & 0xffff), bit_cast<Bits>(b & 0xffff)));
#elif defined(__AVX2__)
  return bit_cast<Halves>(
      _mm256_packus_epi32(bit_cast<Bits>(a & 0xffff), bit_cast<Bits>(b & 0xffff)));
#else
  return upper_halves(a << 16, b << 16);
#endif
}

FUSEDOPT_FN Halves load_halves(const void* from) {
  Halves x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
FUSEDOPT_FN void store_halves(Halves x, void* to) { std::memcpy(to, &x, sizeof(x)); }

// ---- the lanes of two registers -----------------------------------------------------------------

FUSEDOPT_FN Words bits_of(Vec<float> x) { return bit_cast<Words>(x.lanes); }
FUSEDOPT_FN Vec<float> floats_of(Words bits) { return {bit_cast<Vec<float>::Lanes>(bits)}; }

// Bits whose upper half is the nearest bfloat16, ties to even, as encode() has it. NaN needs no
// care where it stems from 16 bits or is the default one: its lower half of zeros carries nothing
// upwards.
FUSEDOPT_FN Words rounded(Vec<float> x) {
  const Words bits = bits_of(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// Lower halves of the one, upper halves of the other.
FUSEDOPT_FN Words low_and_high(Words low, Words high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bit_cast<Words>(_mm256_blend_epi16(bit_cast<Bits>(low), bit_cast<Bits>(high), 0xaa));
#else
  return (low & 0xffff) | (high & 0xffff0000);
#endif
}

// They load and store bfloat16 and compute in float.
struct BFloat16Vec {
  static constexpr int kLanes = 2 * Vec<float>::kLanes;
  Vec<float> a, b;

  // Neighbours to different registers.
  static BFloat16Vec load(const BFloat16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    return {floats_of(pairs << 16), floats_of(pairs & 0xffff0000)};
  }
  void store(BFloat16* to) const {
    const Words pairs = low_and_high(rounded(a) >> 16, rounded(b));
    std::memcpy(to, &pairs, sizeof(pairs));
  }

  friend BFloat16Vec operator+(BFloat16Vec x, BFloat16Vec y) { return {x.a + y.a, x.b + y.b}; }
  friend BFloat16Vec operator-(BFloat16Vec x, BFloat16Vec y) { return {x.a - y.a, x.b - y.b}; }
  friend BFloat16Vec operator*(BFloat16Vec x, BFloat16Vec y) { return {x.a * y.a, x.b * y.b}; }
  friend BFloat16Vec operator/(BFloat16Vec x, BFloat16Vec y) { return {x.a / y.a, x.b / y.b}; }
  friend BFloat16Vec operator+(BFloat16Vec x, float y) { return {x.a + y, x.b + y}; }
  friend BFloat16Vec operator*(BFloat16Vec x, float y) { return {x.a * y, x.b * y}; }
  friend BFloat16Vec sqrt(BFloat16Vec x) { return {sqrt(x.a), sqrt(x.b)}; }
  friend BFloat16Vec sign(BFloat16Vec x) { return {sign(x.a), sign(x.b)}; }
  friend BFloat16Vec max(BFloat16Vec x, BFloat16Vec y) { return {max(x.a, y.a), max(x.b, y.b)}; }
  friend BFloat16Vec min(BFloat16Vec x, float y) { return {min(x.a, y), min(x.b, y)}; }
};

// ---- the order of halves ------------------------------------------------------------------------

FUSEDOPT_FN BFloat16Vec load_in_halves(const BFloat16* from) {
  const Halves bits = load_halves(from);
  return {floats_of(widen_a(Halves{}, bits)), floats_of(widen_b(Halves{}, bits))};
}
FUSEDOPT_FN void store_in_halves(BFloat16Vec x, BFloat16* to) {
  store_halves(upper_halves(rounded(x.a), rounded(x.b)), to);
}

// ---- floats in that order -----------------------------------------------------------------------

FUSEDOPT_FN BFloat16Vec in_halves_order(Vec<float> x, Vec<float> y) {
#if defined(__AVX512F__)
  const __m512i a = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
  const __m512i b = _mm512_set_epi32(31, 30, 29, 28, 23, 22, 21, 20, 15, 14, 13, 12, 7, 6, 5, 4);
  return {{_mm512_permutex2var_ps(x.lanes, a, y.lanes)},
          {_mm512_permutex2var_ps(x.lanes, b, y.lanes)}};
#elif defined(__AVX2__)
  return {{_mm256_permute2f128_ps(x.lanes, y.lanes, 0x20)},
          {_mm256_permute2f128_ps(x.lanes, y.lanes, 0x31)}};
#else
  return {x, y};
#endif
}
FUSEDOPT_FN BFloat16Vec in_memory_order(BFloat16Vec x) {
#if defined(__AVX512F__)
  const __m512i a = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i b = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  return {{_mm512_permutex2var_ps(x.a.lanes, a, x.b.lanes)},
          {_mm512_permutex2var_ps(x.a.lanes, b, x.b.lanes)}};
#else
  return in_halves_order(x.a, x.b);  // which is its own inverse
#endif
}

FUSEDOPT_FN BFloat16Vec load_in_halves(const float* from) {
  return in_halves_order(Vec<float>::load(from), Vec<float>::load(from + Vec<float>::kLanes));
}
FUSEDOPT_FN void store_in_halves(BFloat16Vec x, float* to) {
  const BFloat16Vec in_order = in_memory_order(x);
  in_order.a.store(to);
  in_order.b.store(to + Vec<float>::kLanes);
}

// ---- bytes as halves ----------------------------------------------------------------------------

FUSEDOPT_FN Halves load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  __m256i bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bit_cast<Halves>(_mm512_maskz_cvtepu8_epi16(0xffffffff, bytes));
#elif defined(__AVX2__)
  __m128i bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bit_cast<Halves>(_mm256_cvtepu8_epi16(bytes));
#elif defined(__SSE2__)
  int64_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bit_cast<Halves>(_mm_unpacklo_epi8(_mm_cvtsi64_si128(bytes), __m128i{}));
#elif defined(__aarch64__)
  return bit_cast<Halves>(vmovl_u8(vld1_u8(from)));
#else
  Halves x;
  for (int i = 0; i < kVectorBytes / 2; ++i) x[i] = from[i];
  return x;
#endif
}

FUSEDOPT_FN Halves load_signed_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  __m256i bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bit_cast<Halves>(_mm512_maskz_cvtepi8_epi16(0xffffffff, bytes));
#elif defined(__AVX2__)
  __m128i bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bit_cast<Halves>(_mm256_cvtepi8_epi16(bytes));
#else
  const Halves x = load_bytes(from);
  return (x ^ 0x80) - 0x80;
#endif
}

// Of numbers below 256.
FUSEDOPT_FN void store_bytes(Halves x, uint8_t* to) {
#if defined(__AVX512F__)
  const __m256i bytes = _mm512_maskz_cvtepi16_epi8(0xffffffff, bit_cast<__m512i>(x));
  std::memcpy(to, &bytes, sizeof(bytes));
#elif defined(__AVX2__)
  const __m256i all = bit_cast<__m256i>(x);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  std::memcpy(to, &bytes, sizeof(bytes));
#elif defined(__SSE2__)
  const __m128i all = bit_cast<__m128i>(x);
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(all, all));
  std::memcpy(to, &bytes, sizeof(bytes));
#elif defined(__aarch64__)
  vst1_u8(to, vmovn_u16(bit_cast<uint16x8_t>(x)));
#else
  for (int i = 0; i < kVectorBytes / 2; ++i) to[i] = static_cast<uint8_t>(x[i]);
#endif
}
