// Vec<T>: the lanes of one register of the instruction set this file is compiled for, as GCC and
// Clang vector extensions. Every operation is one that IEEE 754 rounds correctly, so all
// instruction sets give the same bits. Included inside the ISA's namespace; kVectorBytes is set
// there.
#pragma once

#include "numeric/codec.h"

using std::sqrt;  // of the scalars of a rule

template <class T>
struct Vec {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  typedef T Lanes __attribute__((vector_size(kVectorBytes)));
  Lanes lanes;

  static Vec load(const T* from) {
    Vec x;
    std::memcpy(&x.lanes, from, sizeof(x.lanes));
    return x;
  }
  void store(T* to) const { std::memcpy(to, &lanes, sizeof(lanes)); }

#if defined(__AVX512F__)
  static Vec load(const Float16* from) {
    __m256i halves;
    std::memcpy(&halves, from, sizeof(halves));
    return {_mm512_maskz_cvtph_ps(0xffff, halves)};
  }
  void store(Float16* to) const {
    const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, lanes, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof(halves));
  }
#elif defined(__F16C__)
  static Vec load(const Float16* from) {
    __m128i halves;
    std::memcpy(&halves, from, sizeof(halves));
    return {_mm256_cvtph_ps(halves)};
  }
  void store(Float16* to) const {
    const __m128i halves = _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof(halves));
  }
#endif

  friend Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  friend Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  friend Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  friend Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
  friend Vec operator+(Vec a, T b) { return {a.lanes + b}; }
  friend Vec operator*(Vec a, T b) { return {a.lanes * b}; }
};

// Of a zero of either sign, +0.
template <class T>
Vec<T> abs(Vec<T> x) {
  return Vec<T>{x.lanes < 0 ? -x.lanes : x.lanes} + T(0);
}

// Floats, as many as a register has doubles. Of a __builtin_convertvector, GCC 12 makes four
// instructions.
typedef float HalfLanes __attribute__((vector_size(kVectorBytes / 2)));
inline Vec<double> to_doubles(HalfLanes x) {
#if defined(__AVX512F__)
  return {_mm512_maskz_cvtps_pd(0xff, x)};
#elif defined(__AVX2__)
  return {_mm256_cvtps_pd(x)};
#else
  return {__builtin_convertvector(x, Vec<double>::Lanes)};
#endif
}

inline Vec<double> load_as_double(const double* from) { return Vec<double>::load(from); }
inline Vec<double> load_as_double(const float* from) {
  HalfLanes floats;
  std::memcpy(&floats, from, sizeof(floats));
  return to_doubles(floats);
}
#if defined(__AVX512F__)
inline Vec<double> load_as_double(const BFloat16* from) {
  __m128i halves;
  std::memcpy(&halves, from, sizeof(halves));
  return to_doubles(bit_cast<HalfLanes>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
#elif defined(__AVX2__)
inline Vec<double> load_as_double(const BFloat16* from) {
  int64_t halves;
  std::memcpy(&halves, from, sizeof(halves));
  const __m128i words = _mm_cvtepu16_epi32(_mm_cvtsi64_si128(halves));
  return to_doubles(bit_cast<HalfLanes>(_mm_slli_epi32(words, 16)));
}
#endif

// Torch's maximum: a NaN in either argument is the result.
template <class T>
Vec<T> max(Vec<T> a, Vec<T> b) {
  return {((a.lanes > b.lanes) | (a.lanes != a.lanes)) ? a.lanes : b.lanes};
}

// Torch's sign: 0 for zeros of either sign and for NaN.
template <class T>
Vec<T> sign(Vec<T> x) {
  const Vec<T> zero{};
  const Vec<T> one = zero + T(1);
  return {x.lanes > 0 ? one.lanes : (x.lanes < 0 ? -one.lanes : zero.lanes)};
}

// NaN where x is. (GCC 12 compares and blends where one instruction would do.)
#if defined(__AVX512F__)
inline Vec<float> min(Vec<float> x, float most) {
  return {_mm512_maskz_min_ps(0xffff, Vec<float>{}.lanes + most, x.lanes)};
}
inline Vec<double> min(Vec<double> x, double most) {
  return {_mm512_maskz_min_pd(0xff, Vec<double>{}.lanes + most, x.lanes)};
}
#elif defined(__AVX2__)
inline Vec<float> min(Vec<float> x, float most) {
  return {_mm256_min_ps(Vec<float>{}.lanes + most, x.lanes)};
}
inline Vec<double> min(Vec<double> x, double most) {
  return {_mm256_min_pd(Vec<double>{}.lanes + most, x.lanes)};
}
#else
template <class T>
Vec<T> min(Vec<T> x, T most) {
  const typename Vec<T>::Lanes all = Vec<T>{}.lanes + most;
  return {x.lanes > all ? all : x.lanes};
}
#endif

// One intrinsic an instruction set: compilers do not reliably vectorize a loop of sqrt over lanes.
#if defined(__AVX512F__)
// (The forms without a mask warn of an uninitialized variable inside GCC 12's own header.)
inline Vec<float> sqrt(Vec<float> x) { return {_mm512_maskz_sqrt_ps(0xffff, x.lanes)}; }
inline Vec<double> sqrt(Vec<double> x) { return {_mm512_maskz_sqrt_pd(0xff, x.lanes)}; }
#elif defined(__AVX2__)
inline Vec<float> sqrt(Vec<float> x) { return {_mm256_sqrt_ps(x.lanes)}; }
inline Vec<double> sqrt(Vec<double> x) { return {_mm256_sqrt_pd(x.lanes)}; }
#elif defined(__SSE2__)
inline Vec<float> sqrt(Vec<float> x) { return {_mm_sqrt_ps(x.lanes)}; }
inline Vec<double> sqrt(Vec<double> x) { return {_mm_sqrt_pd(x.lanes)}; }
#elif defined(__aarch64__)
inline Vec<float> sqrt(Vec<float> x) { return {vsqrtq_f32(x.lanes)}; }
inline Vec<double> sqrt(Vec<double> x) { return {vsqrtq_f64(x.lanes)}; }
#else
template <class T>
Vec<T> sqrt(Vec<T> x) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.lanes[i] = std::sqrt(x.lanes[i]);
  return x;
}
#endif

// The first n elements, 0 < n < V::kLanes; memory after them is not touched.
template <class V, class Stored>
V load_partial(const Stored* from, int64_t n) {
  Stored padded[V::kLanes] = {};
  std::memcpy(padded, from, static_cast<size_t>(n) * sizeof(Stored));
  return V::load(padded);
}

template <class V, class Stored>
void store_partial(V x, Stored* to, int64_t n) {
  Stored padded[V::kLanes];
  x.store(padded);
  std::memcpy(to, padded, static_cast<size_t>(n) * sizeof(Stored));
}
