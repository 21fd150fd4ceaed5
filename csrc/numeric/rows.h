// Where blocks of elements begin that have a scale together.
#pragma once

#include <cstdint>

namespace fusedopt {

constexpr int64_t kBlock = 32;  // elements

// Blocks do not cross the rows of dimension 0, by which parameters are split among processes: the
// last one of a row may be shorter.
struct Rows {
  int64_t length = kBlock;

  constexpr int64_t blocks() const { return (length + kBlock - 1) / kBlock; }
  // The number of the block that an element is in, and where that begins and ends.
  constexpr int64_t block_of(int64_t element) const {
    if (length % kBlock == 0) return element / kBlock;
    return element / length * blocks() + element % length / kBlock;
  }
  constexpr int64_t begin_of_block(int64_t element) const {
    if (length % kBlock == 0) return element / kBlock * kBlock;
    return element - element % length % kBlock;
  }
  constexpr int64_t end_of_block(int64_t element) const {
    const int64_t end = begin_of_block(element) + kBlock;
    if (length % kBlock == 0) return end;
    const int64_t end_of_row = element - element % length + length;
    return end < end_of_row ? end : end_of_row;
  }
  // The first block that begins at this element or after it begins here.
  constexpr int64_t next_block(int64_t element) const {
    return begin_of_block(element) == element ? element : end_of_block(element);
  }
};

}  // namespace fusedopt
