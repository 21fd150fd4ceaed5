// How far ahead of its elements an update asks for memory.
#pragma once

#include <cstdint>

namespace fusedopt {

// In bytes, for each of an update's arrays, so many that it walks through side by side, and this
// one so long; 0 where asking does not pay: the line at hand. Chosen once, by what was measured on
// processors of its kind, as each has its own way of guessing what is read next; or by
// FUSEDOPT_AHEAD in the environment, for all arrays. What it gains: benchmarks/NOTES.md. Throws
// std::runtime_error if the variable has no such number.
int64_t bytes_ahead(int arrays, int64_t array_bytes);

constexpr int64_t kLongArray = 32 * 1024;  // from here on

}  // namespace fusedopt
