// What norms add up. Included inside the ISA's namespace.
#pragma once

#include "cpu/tiles.h"

// Element i of a block is added to lane i % kNormLanes, whatever a register holds.
constexpr int kNormLanes = 16;

struct SumOfSizes {
  static Vec<double> add(Vec<double> sum, Vec<double> x) { return sum + abs(x); }
  static double join(double a, double b) { return a + b; }
};
struct SumOfSquares {
  static Vec<double> add(Vec<double> sum, Vec<double> x) { return sum + x * x; }
  static double join(double a, double b) { return a + b; }
};
struct Largest {
  static Vec<double> add(Vec<double> largest, Vec<double> x) { return max(largest, abs(x)); }
  static double join(double a, double b) { return a > b || a != a ? a : b; }
};

template <class Sum, class T>
double norm_block(const T* x, int64_t n, const void* next) {
  constexpr int kVectors = kNormLanes / Vec<double>::kLanes;
  Vec<double> sums[kVectors] = {};
  const auto add = [&](const T* from) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = Sum::add(sums[v], load_as_double(from + v * Vec<double>::kLanes));
    }
  };
  int64_t i = 0;
  const auto add_until = [&](int64_t end, uintptr_t ahead) __attribute__((always_inline)) {
    for (; i + kNormLanes <= end; i += kNormLanes) {
      const uintptr_t line = ahead + static_cast<uintptr_t>(i) * sizeof(T);
      __builtin_prefetch(reinterpret_cast<const void*>(line), 0, /*locality=*/2);
      add(x + i);
    }
  };
  add_until(n - kNormPrefetchBytes / int64_t{sizeof(T)},
            reinterpret_cast<uintptr_t>(x) + kNormPrefetchBytes);
  add_until(n, reinterpret_cast<uintptr_t>(next) - static_cast<uintptr_t>(i) * sizeof(T));
  T padded[kNormLanes] = {};
  std::memcpy(padded, x + i, static_cast<size_t>(n - i) * sizeof(T));
  add(padded);
  double lanes[kNormLanes];
  for (int v = 0; v < kVectors; ++v) sums[v].store(lanes + v * Vec<double>::kLanes);
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = Sum::join(lanes[l], lanes[l + half]);
  }
  return lanes[0];
}

template <class Sum>
void norm_blocks(const Stream& stream, int64_t first, int64_t count, const void* next,
                 double* blocks) {
  const auto norm_in_place = [&](auto* x, int64_t n) {
    x += first;
    return norm_block<Sum>(x, n, n < count ? x + n : next);
  };
  float decoded[kNormBlock];
  while (count > 0) {
    const int64_t n = count < kNormBlock ? count : kNormBlock;
    switch (stream.dtype) {
      case DType::f32:
        *blocks++ = norm_in_place(reinterpret_cast<const float*>(stream.data), n);
        break;
      case DType::f64:
        *blocks++ = norm_in_place(reinterpret_cast<const double*>(stream.data), n);
        break;
#if defined(__AVX2__)  // for the generic kernels, a tile takes less time
      case DType::bf16:
        *blocks++ = norm_in_place(reinterpret_cast<const BFloat16*>(stream.data), n);
        break;
#endif
      default:
        decode_tile(stream, {}, first, decoded, n, first + count, next);
        *blocks++ = norm_block<Sum>(decoded, n, decoded);
    }
    first += n;
    count -= n;
  }
}
