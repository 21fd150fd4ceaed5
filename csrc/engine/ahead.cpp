#include "engine/ahead.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedopt {

namespace {

struct Ahead {
  int64_t in_short, in_long;  // arrays
};

Ahead of_this_processor() {
#if defined(__x86_64__)
  // Measured on Zen 3: what is asked for far ahead gets in the way of what the processor asks for
  // itself, which it does once it has seen some of an array.
  if (__builtin_cpu_is("amd")) return {2048, 512};
#endif
  return {2048, 2048};  // measured on Intel; others for want of a machine
}

Ahead choose() {
  const char* const asked = std::getenv("FUSEDOPT_AHEAD");
  if (!asked || !*asked) return of_this_processor();
  long bytes = 0;
  int length = 0;
  const bool reads = std::sscanf(asked, "%ld%n", &bytes, &length) == 1 && !asked[length];
  if (!reads || bytes < 64 || bytes > 8192 || bytes % 64 != 0) {
    throw std::runtime_error("FUSEDOPT_AHEAD='" + std::string(asked) +
                             "', expected a multiple of 64 from 64 to 8192: bytes");
  }
  return {bytes, bytes};
}

}  // namespace

int64_t bytes_ahead(int64_t array_bytes) {
  constexpr int64_t kLong = 32 * 1024;
  static const Ahead ahead = choose();
  return array_bytes < kLong ? ahead.in_short : ahead.in_long;
}

}  // namespace fusedopt
