// The text that avx512 is compiled from, for processors that have AVX2 alone: the compiler lowers
// 64-byte vectors to two registers each, and the intrinsics of AVX-512 are defined here. So every
// such machine can hold that text against the others.

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#define FUSEDOPT_WIDE_FN [[gnu::always_inline]] inline

namespace {

template <class Lanes>
FUSEDOPT_WIDE_FN Lanes sqrt_each(Lanes x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// The second, too, where a number is none.
template <class Lanes>
FUSEDOPT_WIDE_FN Lanes min_each(Lanes a, Lanes b) {
  return a < b ? a : b;
}

// AVX-512's rearrangements of small elements are those of AVX2, in each half of the register.
template <class F>
FUSEDOPT_WIDE_FN __m512i in_halves(__m512i a, __m512i b, F f) {
  __m256i x[2], y[2];
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  for (int i = 0; i < 2; ++i) x[i] = f(x[i], y[i]);
  std::memcpy(&a, x, sizeof(a));
  return a;
}
FUSEDOPT_WIDE_FN __m512i unpacklo_epi16(__m512i a, __m512i b) {
  return in_halves(a, b, [](__m256i x, __m256i y) { return _mm256_unpacklo_epi16(x, y); });
}
FUSEDOPT_WIDE_FN __m512i unpackhi_epi16(__m512i a, __m512i b) {
  return in_halves(a, b, [](__m256i x, __m256i y) { return _mm256_unpackhi_epi16(x, y); });
}
FUSEDOPT_WIDE_FN __m512i packs_epi32(__m512i a, __m512i b) {
  return in_halves(a, b, [](__m256i x, __m256i y) { return _mm256_packs_epi32(x, y); });
}
FUSEDOPT_WIDE_FN __m512i packus_epi32(__m512i a, __m512i b) {
  return in_halves(a, b, [](__m256i x, __m256i y) { return _mm256_packus_epi32(x, y); });
}
FUSEDOPT_WIDE_FN __m512i shuffle_i64x2(__m512i a, __m512i b, int order) {
  const __m512i both[] = {a, b};
  __m512i to;
  for (int i = 0; i < 4; ++i) {
    const int from = (order >> 2 * i & 3) + i / 2 * 4;
    std::memcpy(reinterpret_cast<char*>(&to) + 16 * i,
                reinterpret_cast<const char*>(both) + 16 * from, 16);
  }
  return to;
}

FUSEDOPT_WIDE_FN __m512 decode_f16(__m256i from) {
  __m128i halves[2];
  std::memcpy(halves, &from, sizeof(from));
  const __m256 floats[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
  __m512 to;
  std::memcpy(&to, floats, sizeof(to));
  return to;
}
FUSEDOPT_WIDE_FN __m256i encode_f16(__m512 from) {
  __m256 floats[2];
  std::memcpy(floats, &from, sizeof(from));
  const __m128i halves[2] = {_mm256_cvtps_ph(floats[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(floats[1], _MM_FROUND_TO_NEAREST_INT)};
  __m256i to;
  std::memcpy(&to, halves, sizeof(to));
  return to;
}
// AVX-512's own, from memory to memory.
template <class To, class From, class F>
FUSEDOPT_WIDE_FN To in_memory(const From& from, F f) {
  To to;
  f(reinterpret_cast<const char*>(&from), reinterpret_cast<char*>(&to));
  return to;
}
template <class Narrow>
FUSEDOPT_WIDE_FN __m512i widen_bytes(__m256i from) {
  return in_memory<__m512i>(from, [](const char* x, char* y) {
    for (int i = 0; i < 32; ++i) {
      Narrow byte;
      std::memcpy(&byte, x + i, 1);
      const auto half = static_cast<int16_t>(byte);
      std::memcpy(y + 2 * i, &half, 2);
    }
  });
}
FUSEDOPT_WIDE_FN __m256i narrow_halves(__m512i from) {
  return in_memory<__m256i>(from, [](const char* x, char* y) {
    for (int i = 0; i < 32; ++i) y[i] = x[2 * i];
  });
}
template <class Lane, class V>
FUSEDOPT_WIDE_FN V permute_two(V a, __m512i order, V b) {
  constexpr int kLanes = 64 / sizeof(Lane);
  Lane from[2 * kLanes], to[kLanes], at[kLanes];
  std::memcpy(from, &a, 64);
  std::memcpy(from + kLanes, &b, 64);
  std::memcpy(at, &order, 64);
  for (int i = 0; i < kLanes; ++i) to[i] = from[at[i]];
  V result;
  std::memcpy(&result, to, 64);
  return result;
}
template <class Lane, class... Lanes>
FUSEDOPT_WIDE_FN __m512i set_lanes(Lanes... from_the_last) {
  const Lane lanes[] = {static_cast<Lane>(from_the_last)...};
  Lane in_order[64 / sizeof(Lane)];
  for (size_t i = 0; i < sizeof...(Lanes); ++i) in_order[sizeof...(Lanes) - 1 - i] = lanes[i];
  __m512i result;
  std::memcpy(&result, in_order, 64);
  return result;
}
FUSEDOPT_WIDE_FN __m512i multiply_epu32(__m512i a, __m512i b) {
  return in_halves(a, b, [](__m256i x, __m256i y) { return _mm256_mul_epu32(x, y); });
}
FUSEDOPT_WIDE_FN __m512d decode_f32(__m256 from) { return __builtin_convertvector(from, __m512d); }

}  // namespace

// Macros, because immintrin.h has functions of these names for AVX-512 alone.
#undef _mm512_maskz_cvtps_ph
#undef _mm512_maskz_shuffle_i64x2
#define _mm512_maskz_sqrt_ps(mask, x) sqrt_each(x)
#define _mm512_maskz_sqrt_pd(mask, x) sqrt_each(x)
#define _mm512_maskz_min_ps(mask, a, b) min_each(a, b)
#define _mm512_maskz_min_pd(mask, a, b) min_each(a, b)
#define _mm512_maskz_cvtps_pd(mask, x) decode_f32(x)
#define _mm512_maskz_cvtph_ps(mask, x) decode_f16(x)
#define _mm512_maskz_cvtps_ph(mask, x, rounding) encode_f16(x)
#define _mm512_unpacklo_epi16(a, b) unpacklo_epi16(a, b)
#define _mm512_unpackhi_epi16(a, b) unpackhi_epi16(a, b)
#define _mm512_packs_epi32(a, b) packs_epi32(a, b)
#define _mm512_packus_epi32(a, b) packus_epi32(a, b)
#define _mm512_maskz_shuffle_i64x2(mask, a, b, order) shuffle_i64x2(a, b, order)
#define _mm512_maskz_cvtepu8_epi16(mask, x) widen_bytes<uint8_t>(x)
#define _mm512_maskz_cvtepi8_epi16(mask, x) widen_bytes<int8_t>(x)
#define _mm512_maskz_cvtepi16_epi8(mask, x) narrow_halves(x)
#define _mm512_maskz_mul_epu32(mask, a, b) multiply_epu32(a, b)
#define _mm512_permutex2var_ps(a, order, b) permute_two<uint32_t>(a, order, b)
#define _mm512_permutex2var_epi64(a, order, b) permute_two<uint64_t>(a, order, b)
#undef _mm512_set_epi32
#undef _mm512_set_epi64
#define _mm512_set_epi32 set_lanes<int32_t>
#define _mm512_set_epi64 set_lanes<int64_t>

#define __AVX512F__ 1
#define FUSEDOPT_ISA wide
#include "cpu/kernel.cpp"
