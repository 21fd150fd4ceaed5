// What an update has changed of a parameter, added up. Included inside the ISA's namespace.
#pragma once

#include "cpu/tiles.h"

static_assert(kChangeLanes % Vec<double>::kLanes == 0);

inline Vec<double> difference(const double* a, const double* b) {
  return Vec<double>::load(a) - Vec<double>::load(b);
}
// In float: of two that are close, it is exact.
inline Vec<double> difference(const float* a, const float* b) {
  HalfLanes x, y;
  std::memcpy(&x, a, sizeof(x));
  std::memcpy(&y, b, sizeof(y));
  return to_doubles(x - y);
}

// Element i is added to lane i % kChangeLanes, whatever a register holds.
template <class T>
void add_changes(const T* now, const T* before, int64_t n, ChangeLanes* to) {
  constexpr int kVectors = kChangeLanes / Vec<double>::kLanes;
  Vec<double> param[kVectors], update[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    param[v] = Vec<double>::load(to->param + v * Vec<double>::kLanes);
    update[v] = Vec<double>::load(to->update + v * Vec<double>::kLanes);
  }
  const auto add = [&](const T* now, const T* before) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<double> x = load_as_double(now + v * Vec<double>::kLanes);
      const Vec<double> moved =
          difference(now + v * Vec<double>::kLanes, before + v * Vec<double>::kLanes);
      param[v] = param[v] + x * x;
      update[v] = update[v] + moved * moved;
    }
  };
  int64_t i = 0;
  for (; i + kChangeLanes <= n; i += kChangeLanes) add(now + i, before + i);
  if (i < n) {
    T last[2][kChangeLanes] = {};
    std::memcpy(last[0], now + i, static_cast<size_t>(n - i) * sizeof(T));
    std::memcpy(last[1], before + i, static_cast<size_t>(n - i) * sizeof(T));
    add(last[0], last[1]);
  }
  for (int v = 0; v < kVectors; ++v) {
    param[v].store(to->param + v * Vec<double>::kLanes);
    update[v].store(to->update + v * Vec<double>::kLanes);
  }
}

inline void keep(const Stream& param, int64_t first, int64_t count, void* numbers) {
  const char* const data = param.data + first * item_size(param.dtype);
  if (param.dtype == DType::f64)
    return decode_all<double>(data, static_cast<double*>(numbers), count);
  decode_tile(param, {}, first, static_cast<float*>(numbers), count, first + count, numbers);
}

inline void add_change(const Stream& param, int64_t first, int64_t count, const void* before,
                       ChangeLanes* to) {
  if (param.dtype == DType::f64) {
    const auto* const now = reinterpret_cast<const double*>(param.data) + first;
    return add_changes(now, static_cast<const double*>(before), count, to);
  }
  const auto* was = static_cast<const float*>(before);
  if (param.dtype == DType::f32) {
    return add_changes(reinterpret_cast<const float*>(param.data) + first, was, count, to);
  }
  float now[kTile];
  for (int64_t at = 0; at < count; at += kTile) {
    const int64_t n = count - at < kTile ? count - at : kTile;
    decode_tile(param, {}, first + at, now, n, first + count, now);
    add_changes(now, was + at, n, to);
    int32_t unmoved = 0;
    for (int64_t i = 0; i < n; ++i) unmoved += now[i] == was[at + i];
    to->unmoved += unmoved;
  }
}
