#include "engine/ahead.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusedopt {

namespace {

struct Ahead {
  int64_t in_short, in_long, in_two_long;  // arrays
};

#if defined(__x86_64__)
unsigned family() {
  unsigned a = 0, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned base = a >> 8 & 0xf;
  return base == 0xf ? base + (a >> 20 & 0xff) : base;
}
#endif

Ahead of_this_processor() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd")) {
    // Measured on Zen 5, which follows two arrays better if it is left alone.
    if (family() >= 0x1a) return {2048, 2048, 0};
    // Measured on Zen 3: what is asked for far ahead gets in the way of what the processor asks
    // for itself, which it does once it has seen some of an array.
    return {2048, 512, 512};
  }
#endif
  return {2048, 2048, 2048};  // measured on Intel; others for want of a machine
}

Ahead choose() {
  const char* const asked = std::getenv("FUSEDOPT_AHEAD");
  if (!asked || !*asked) return of_this_processor();
  long bytes = 0;
  int length = 0;
  const bool reads = std::sscanf(asked, "%ld%n", &bytes, &length) == 1 && !asked[length];
  if (!reads || bytes < 0 || bytes > 8192 || bytes % 64 != 0) {
    throw std::runtime_error("FUSEDOPT_AHEAD='" + std::string(asked) +
                             "', expected a multiple of 64 from 0 to 8192: bytes");
  }
  return {bytes, bytes, bytes};
}

}  // namespace

int64_t bytes_ahead(int arrays, int64_t array_bytes) {
  static const Ahead ahead = choose();
  if (array_bytes < kLongArray) return ahead.in_short;
  return arrays > 2 ? ahead.in_long : ahead.in_two_long;
}

}  // namespace fusedopt
