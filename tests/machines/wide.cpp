// The text that avx512 is compiled from, for x86-64 processors without AVX-512: the compiler lowers
// its 64-byte vectors to the registers there are, and the intrinsics it uses are defined here. So
// every such machine can hold that text against the others.

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#if defined(__AVX512F__)
#error "this file is for processors without AVX-512"
#endif

#define FUSEDOPT_WIDE_FN [[gnu::always_inline]] inline

namespace {

template <class Lanes>
FUSEDOPT_WIDE_FN Lanes sqrt_each(Lanes x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// AVX-512's rearrangements of small elements are those of SSE2, in each quarter of the register.
template <class F>
FUSEDOPT_WIDE_FN __m512i in_quarters(__m512i a, __m512i b, F f) {
  __m128i x[4], y[4];
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  for (int i = 0; i < 4; ++i) x[i] = f(x[i], y[i]);
  std::memcpy(&a, x, sizeof(a));
  return a;
}
FUSEDOPT_WIDE_FN __m512i unpacklo_epi16(__m512i a, __m512i b) {
  return in_quarters(a, b, [](__m128i x, __m128i y) { return _mm_unpacklo_epi16(x, y); });
}
FUSEDOPT_WIDE_FN __m512i unpackhi_epi16(__m512i a, __m512i b) {
  return in_quarters(a, b, [](__m128i x, __m128i y) { return _mm_unpackhi_epi16(x, y); });
}
FUSEDOPT_WIDE_FN __m512i packs_epi32(__m512i a, __m512i b) {
  return in_quarters(a, b, [](__m128i x, __m128i y) { return _mm_packs_epi32(x, y); });
}

}  // namespace

#define _mm512_maskz_sqrt_ps(mask, x) sqrt_each(x)
#define _mm512_maskz_sqrt_pd(mask, x) sqrt_each(x)
#define _mm512_unpacklo_epi16(a, b) unpacklo_epi16(a, b)
#define _mm512_unpackhi_epi16(a, b) unpackhi_epi16(a, b)
#define _mm512_packs_epi32(a, b) packs_epi32(a, b)

#define __AVX512F__ 1
#define FUSEDOPT_ISA wide
#include "cpu_kernel.cpp"
