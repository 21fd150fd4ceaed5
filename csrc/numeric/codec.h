// How a stored element becomes a compute element and back, rounding to nearest even, one by one and
// in tiles. A rule never sees a stored type. 16-bit elements convert through float, for double too,
// as torch's own casts do. (The same conversions for whole registers, with the same bits: of
// float16 in vec.h, of bfloat16 in vec16.h, of what takes two arrays or random bits in
// vec_codec.h.) Included inside a back end's namespace.
#pragma once

template <class To, class From>
FUSEDOPT_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FUSEDOPT_FN float decode(float x) { return x; }
FUSEDOPT_FN double decode(double x) { return x; }
FUSEDOPT_FN float decode(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

// Selects instead of branches, so that the loops below vectorize.
FUSEDOPT_FN float decode(Float16 x) {
#if defined(__CUDA_ARCH__)  // a GPU has instructions for it
  return __half2float(__ushort_as_half(x.bits));
#else
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fff) << 13;
  const uint32_t sign = (uint32_t{x.bits} & 0x8000) << 16;
  const uint32_t normal = magnitude + kRebias;
  // A subnormal's digits, read as a number just above 2^-14, less 2^-14.
  const float smallest_normal = bit_cast<float>(kRebias + (1u << 23));
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(normal + (1u << 23)) - smallest_normal);
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  const uint32_t any = magnitude < (31u << 23) ? finite : magnitude + 2 * kRebias;
  return bit_cast<float>(any | sign);
#endif
}

FUSEDOPT_FN void encode(float x, float& to) { to = x; }
FUSEDOPT_FN void encode(double x, float& to) { to = static_cast<float>(x); }
FUSEDOPT_FN void encode(double x, double& to) { to = x; }

FUSEDOPT_FN void encode(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
#endif
}

FUSEDOPT_FN void encode(float x, Float16& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - kRebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The last digit of 0.5f is 2^-24, the unit of the subnormals: the addition rounds to it.
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t finite = magnitude < kRebias + (1u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t any = magnitude < kRebias + (31u << 23) ? finite : special;
  to.bits = static_cast<uint16_t>(any | ((bits >> 16) & 0x8000));
#endif
}

FUSEDOPT_FN void encode(double x, BFloat16& to) { encode(static_cast<float>(x), to); }
FUSEDOPT_FN void encode(double x, Float16& to) { encode(static_cast<float>(x), to); }

// ---- bfloat16 with the bits that it lacks -------------------------------------------------------

// A float is a bfloat16, to which it is rounded, and a difference of 16 bits: all of it, exactly.
// Ties are rounded away from zero: to even, an even bfloat16 would have 65,537 floats.
struct SplitFloat {
  uint16_t bits;
  int16_t remainder;
};

FUSEDOPT_FN float decode(SplitFloat x) {
  const int32_t magnitude = (x.bits & 0x7fff) << 16;
  const int32_t sum = magnitude + x.remainder;
  // If someone else has written the parameter, it may be 0 or infinite beside any remainder.
  constexpr int32_t kInfinity = 0x7f800000;
  const int32_t most = magnitude > kInfinity ? magnitude : kInfinity;
  const int32_t any = sum < 0 ? 0 : sum < most ? sum : most;
  return bit_cast<float>(static_cast<uint32_t>(any) | (uint32_t{x.bits} & 0x8000) << 16);
}

FUSEDOPT_FN void encode(float x, SplitFloat& to) {
  const uint32_t any = bit_cast<uint32_t>(x);
  const uint32_t bits = x != x ? 0x7fc00000 : any;
  to.bits = static_cast<uint16_t>((bits + 0x8000) >> 16);
  to.remainder = static_cast<int16_t>(bits & 0xffff);
}

// ---- float16 beside the float that it is rounded from -------------------------------------------

struct MasterFloat {
  uint16_t bits;
  float master;
};

// If someone else has written the parameter, that is what counts.
FUSEDOPT_FN float decode(MasterFloat x) {
  Float16 rounded;
  encode(x.master, rounded);
  return rounded.bits == x.bits ? x.master : decode(Float16{x.bits});
}

FUSEDOPT_FN void encode(float x, MasterFloat& to) {
  Float16 rounded;
  encode(x, rounded);
  to = {rounded.bits, x};
}

// ---- rounding at random -------------------------------------------------------------------------

// With 16 random bits: up as often as the digits say that are dropped.
FUSEDOPT_FN uint16_t round_at_random(float x, uint32_t random, BFloat16) {
  const uint32_t rounded = (bit_cast<uint32_t>(x) + random) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

FUSEDOPT_FN uint16_t round_at_random(float x, uint32_t random, Float16) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  constexpr uint32_t kLargestFinite = 0x7bff;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7fffffff;
  const uint32_t normal = (magnitude - kRebias + (random >> 3)) >> 13;
  const bool is_normal = magnitude >= kRebias + (1u << 23);
  const float small = is_normal ? 0.0f : bit_cast<float>(magnitude);
  const uint32_t units = static_cast<uint32_t>(small * 1099511627776.0f);  // of 2^-40
  const uint32_t subnormal = (units + random) >> 16;
  const uint32_t any = is_normal ? normal : subnormal;
  Float16 nearest;
  encode(x, nearest);
  const uint32_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000;
  const uint32_t finite = any < kLargestFinite ? any : kLargestFinite;
  return static_cast<uint16_t>(magnitude <= 0x477fe000 ? finite | sign : nearest.bits);
}

// ---- arrays -------------------------------------------------------------------------------------

template <class Stored, class T>
void decode_all(const void* from, T* to, int64_t n) {
  const char* bytes = static_cast<const char*>(from);
  int64_t i = 0;
#if defined(__F16C__)  // compilers do not vectorize the conversion themselves
  if constexpr (std::is_same_v<Stored, Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= n; i += 8) {
      __m128i eight;
      std::memcpy(&eight, bytes + i * 2, sizeof(eight));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
    }
  }
#endif
  for (; i < n; ++i) {
    Stored element;
    std::memcpy(&element, bytes + i * int64_t{sizeof(Stored)}, sizeof(element));
    to[i] = static_cast<T>(decode(element));
  }
}

template <class Stored, class T>
void encode_all(const T* from, void* to, int64_t n) {
  char* bytes = static_cast<char*>(to);
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<Stored, Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      std::memcpy(bytes + i * 2, &eight, sizeof(eight));
    }
  }
#endif
  for (; i < n; ++i) {
    Stored element;
    encode(from[i], element);
    std::memcpy(bytes + i * int64_t{sizeof(Stored)}, &element, sizeof(element));
  }
}
