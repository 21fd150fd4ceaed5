// Stored elements as bits: inputs that are the same on every machine, and slow conversions written
// from the definition of the formats, to hold the kernels' fast ones against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "engine/job.h"

namespace machines {

using fusedopt::DType;

constexpr const char* kDTypeNames[] = {"f32", "f64", "bf16", "f16"};
inline const char* name(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }
using fusedopt::item_size;

struct Format {
  int exponent_bits, fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint64_t max_exponent() const { return (uint64_t{1} << exponent_bits) - 1; }
  uint64_t max_fraction() const { return (uint64_t{1} << fraction_bits) - 1; }
  uint64_t infinity() const { return max_exponent() << fraction_bits; }
  uint64_t sign() const { return uint64_t{1} << (exponent_bits + fraction_bits); }
};
inline Format format(DType dtype) {
  constexpr Format kFormats[] = {{8, 23}, {11, 52}, {8, 7}, {5, 10}};
  return kFormats[static_cast<int>(dtype)];
}

inline uint64_t load(const char* from, DType dtype) {
  const auto load_as = [&](auto bits) -> uint64_t {
    std::memcpy(&bits, from, sizeof(bits));
    return bits;
  };
  switch (item_size(dtype)) {
    case 2: return load_as(uint16_t{});
    case 4: return load_as(uint32_t{});
    default: return load_as(uint64_t{});
  }
}
inline void store(uint64_t bits, char* to, DType dtype) {
  const auto store_as = [&](auto element) { std::memcpy(to, &element, sizeof(element)); };
  switch (item_size(dtype)) {
    case 2: return store_as(static_cast<uint16_t>(bits));
    case 4: return store_as(static_cast<uint32_t>(bits));
    default: return store_as(bits);
  }
}

// Which NaN comes out of an operation is the processor's choice: all count as one.
inline uint64_t canonical(uint64_t bits, DType dtype) {
  const Format f = format(dtype);
  const bool nan = (bits & (f.sign() - 1)) > f.infinity();
  return nan ? f.infinity() | (uint64_t{1} << (f.fraction_bits - 1)) : bits;
}

// ---- inputs -------------------------------------------------------------------------------------

// splitmix64 (Steele, Lea & Flood 2014), of any counter.
inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Element `index` of a stream: most between 2^-12 and 2^3; one in 16 anything at all; one in 16
// from the edges of the format, which are zeros, subnormals, the largest values, infinities and
// NaN.
inline uint64_t input(DType dtype, int stream, int64_t index) {
  const Format f = format(dtype);
  const uint64_t random = mix(static_cast<uint64_t>(stream) << 32 | static_cast<uint64_t>(index));
  const uint64_t choice = mix(random);
  uint64_t fraction = random & f.max_fraction();
  uint64_t exponent = static_cast<uint64_t>(f.bias()) - 12 + (choice >> 8) % 16;
  if (choice % 16 == 0) exponent = (choice >> 8) & f.max_exponent();
  if (choice % 16 == 1) {
    const uint64_t exponents[] = {0, 1, f.max_exponent() - 1, f.max_exponent()};
    const uint64_t fractions[] = {0, 0, 1, f.max_fraction()};
    exponent = exponents[(choice >> 8) % 4];
    fraction = fractions[(choice >> 10) % 4];
  }
  // A state may be a mean of squares: fewer of those are negative.
  const bool negative = (choice >> 32) % (stream >= fusedopt::kFirstState ? 4 : 2) == 0;
  return (exponent << f.fraction_bits) | fraction | (negative ? f.sign() : 0);
}

// ---- slow conversions ---------------------------------------------------------------------------

// What stored bits mean.
inline double value(uint64_t bits, DType dtype) {
  const Format f = format(dtype);
  const double sign = bits & f.sign() ? -1 : 1;
  const uint64_t exponent = (bits >> f.fraction_bits) & f.max_exponent();
  const uint64_t fraction = bits & f.max_fraction();
  if (exponent == f.max_exponent()) {
    return fraction ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  const uint64_t digits = exponent ? fraction + f.max_fraction() + 1 : fraction;
  const int unit = std::max(static_cast<int>(exponent), 1) - f.bias() - f.fraction_bits;
  return sign * std::ldexp(static_cast<double>(digits), unit);
}

// The element nearest to x; of two equally near, the one with an even last digit.
inline uint64_t nearest(double x, DType dtype) {
  const Format f = format(dtype);
  const uint64_t sign = std::signbit(x) ? f.sign() : 0;
  if (std::isnan(x)) return canonical(f.sign() - 1, dtype);
  if (std::isinf(x)) return sign | f.infinity();
  int exponent;  // |x| < 2^exponent
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - 1, 1 - f.bias()) - f.fraction_bits;
  const double digits = std::ldexp(std::fabs(x), -unit);  // exact: a double holds more of them
  double whole = std::floor(digits);
  const double rest = digits - whole;
  if (rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) == 1)) ++whole;
  const uint64_t count = static_cast<uint64_t>(whole);
  // A subnormal is its own digits; for the others, a carry out of the fraction raises the exponent.
  const uint64_t leading = f.max_fraction() + 1;
  const uint64_t field = static_cast<uint64_t>(unit + f.fraction_bits + f.bias());
  const uint64_t bits = count < leading ? count : (field << f.fraction_bits) + (count - leading);
  return sign | std::min(bits, f.infinity());
}

}  // namespace machines
