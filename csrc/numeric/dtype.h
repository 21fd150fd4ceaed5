// numeric/: how a number is stored, rounded and computed, on any processor.
#pragma once

#include <cstdint>

namespace fusedopt {

// How elements are stored: as numbers of their own; or, below those, in a way that takes a second
// array, random bits, or both (docs/memory.md).
enum class DType : uint8_t {
  f32,
  f64,
  bf16,
  f16,
  bf16_split,   // a bfloat16, and in the second array the 16 bits that it lacks of a float
  f16_master,   // a float16, and in the second array the float that it is rounded from
  bf16_random,  // rounded up or down at random
  f16_random,
  e4m3,  // eight bits, and in the second array a scale for each block (numeric/blocks.h)
  e5m3,  // the same without a sign
};
constexpr int64_t kItemSize[] = {4, 8, 2, 2, 2, 2, 2, 2, 1, 1};
constexpr int64_t item_size(DType dtype) { return kItemSize[static_cast<int>(dtype)]; }

constexpr bool is_number(DType dtype) { return dtype <= DType::f16; }

// Of the second array's elements, one for each of the first's; 0 if there is none.
constexpr int64_t second_size(DType dtype) {
  return dtype == DType::bf16_split ? 2 : dtype == DType::f16_master ? 4 : 0;
}
constexpr bool has_blocks(DType dtype) { return dtype == DType::e4m3 || dtype == DType::e5m3; }
constexpr bool takes_random_bits(DType dtype) {
  return has_blocks(dtype) || dtype == DType::bf16_random || dtype == DType::f16_random;
}

}  // namespace fusedopt
