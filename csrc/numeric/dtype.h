// numeric/: how a number is stored, rounded and computed, on any processor.
#pragma once

#include <cstdint>

namespace fusedopt {

enum class DType : uint8_t { f32, f64, bf16, f16 };
constexpr int64_t kItemSize[] = {4, 8, 2, 2};

}  // namespace fusedopt
