// The text that avx512 is compiled from, without AVX-512: the compiler lowers its 64-byte vectors to
// the registers there are. So every machine can hold that text against the others.

#include <cmath>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#error "this file is for machines without AVX-512"
#endif

namespace {
template <class Lanes>
[[gnu::always_inline]] inline Lanes sqrt_lanes(Lanes x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}
}  // namespace

#define __AVX512F__ 1
#define _mm512_maskz_sqrt_ps(mask, x) sqrt_lanes(x)
#define _mm512_maskz_sqrt_pd(mask, x) sqrt_lanes(x)
#define FUSEDOPT_ISA wide
#include "cpu_kernel.cpp"
