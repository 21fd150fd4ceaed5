// How far ahead of its elements an update asks for memory.
#pragma once

#include <cstdint>

namespace fusedopt {

// In bytes, the same for each stream of a piece, of which the array in question has so many bytes.
// Chosen once, by the processor's maker, as each has its own way of guessing what is read next; or
// by FUSEDOPT_AHEAD in the environment, for arrays of any length. What it gains:
// benchmarks/NOTES.md. Throws std::runtime_error if the variable has no such number.
int64_t bytes_ahead(int64_t array_bytes);

}  // namespace fusedopt
