// Copies between strided places.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedopt {

// Copies `count` elements of `size` bytes between two strided places.
inline void copy_strided(const char* from, int64_t from_stride, char* to, int64_t to_stride,
                         int64_t count, int64_t size) {
  const auto copy = [&](auto word) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&word, from + i * from_stride * size, sizeof(word));
      std::memcpy(to + i * to_stride * size, &word, sizeof(word));
    }
  };
  switch (size) {
    case 1: return copy(uint8_t{});
    case 2: return copy(uint16_t{});
    case 4: return copy(uint32_t{});
    default: return copy(uint64_t{});
  }
}

}  // namespace fusedopt
