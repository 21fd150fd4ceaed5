// The limit of the memory: a step's traffic with next to no arithmetic, moved in several ways.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedopt {

// How far ahead the ways ask for memory, in bytes; 0 is not at all.
constexpr int kProbedAhead[] = {0, 512, 2048};
constexpr int kProbedLine = 16;  // elements: arrays are a multiple of it, and so aligned

// Adds the second of 3 or 4 arrays of n elements to each of the others. reads_first: after having
// read the second alone, as a norm does. ahead: the index of one of kProbedAhead. temporal: whether
// what is stored is to stay in caches. Throws std::invalid_argument if it cannot.
void move_streams(const std::vector<uintptr_t>& arrays, int64_t n, bool reads_first, int ahead,
                  bool temporal, int threads);

}  // namespace fusedopt
