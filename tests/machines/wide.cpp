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
FUSEDOPT_WIDE_FN __m512d decode_f32(__m256 from) { return __builtin_convertvector(from, __m512d); }

}  // namespace

// Macros, because immintrin.h has functions of these names for AVX-512 alone.
#undef _mm512_maskz_cvtps_ph
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

#define __AVX512F__ 1
#define FUSEDOPT_ISA wide
#include "cpu/kernel.cpp"
