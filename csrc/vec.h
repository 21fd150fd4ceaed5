// Vec<T>: the lanes of one register of the instruction set this file is compiled for, as GCC and
// Clang vector extensions. Every operation is one that IEEE 754 rounds correctly, so all
// instruction sets give the same bits. Included inside the ISA's namespace; kVectorBytes is set
// there.

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// 16-bit elements as words, and words below 2^16 as 16-bit elements. On AVX2 the compiler takes
// several instructions for what is one.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline Words widen(Halves x) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
}
inline Halves narrow(Words words) {
  const __m256i x = bit_cast<__m256i>(words);
  return bit_cast<Halves>(
      _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
#else
inline Words widen(Halves x) { return __builtin_convertvector(x, Words); }
inline Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
#endif

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

  // The first n lanes, 0 < n < kLanes; memory after them is not touched.
  static Vec load_partial(const T* from, int64_t n) {
    Vec x{};
    std::memcpy(&x.lanes, from, static_cast<size_t>(n) * sizeof(T));
    return x;
  }
  void store_partial(T* to, int64_t n) const {
    std::memcpy(to, &lanes, static_cast<size_t>(n) * sizeof(T));
  }

  // Elements stored as bfloat16, converted in registers: the codec's text on lanes.
  static Vec load(const BFloat16* from) {
    static_assert(std::is_same_v<T, float>, "bfloat16 widens to float");
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return {bit_cast<Lanes>(widen(halves) << 16)};
  }
  void store(BFloat16* to) const {
    const Words bits = bit_cast<Words>(lanes);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = narrow(lanes != lanes ? Words{} + 0x7fc0 : rounded);
    std::memcpy(to, &halves, sizeof(halves));
  }
  static Vec load_partial(const BFloat16* from, int64_t n) {
    BFloat16 padded[kLanes] = {};
    std::memcpy(padded, from, static_cast<size_t>(n) * sizeof(BFloat16));
    return load(padded);
  }
  void store_partial(BFloat16* to, int64_t n) const {
    BFloat16 padded[kLanes];
    store(padded);
    std::memcpy(to, padded, static_cast<size_t>(n) * sizeof(BFloat16));
  }

  friend Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  friend Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  friend Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  friend Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
  friend Vec operator+(Vec a, T b) { return {a.lanes + b}; }
  friend Vec operator*(Vec a, T b) { return {a.lanes * b}; }
};

// Torch's maximum: a NaN in either argument is the result.
template <class T>
Vec<T> max(Vec<T> a, Vec<T> b) {
  return {(a.lanes > b.lanes) | (a.lanes != a.lanes) ? a.lanes : b.lanes};
}

// Torch's sign: 0 for zeros of either sign and for NaN.
template <class T>
Vec<T> sign(Vec<T> x) {
  const Vec<T> zero{};
  const Vec<T> one = zero + T(1);
  return {x.lanes > 0 ? one.lanes : (x.lanes < 0 ? -one.lanes : zero.lanes)};
}

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
