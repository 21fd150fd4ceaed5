// What an update has changed of a parameter, added up afterwards. Included inside the ISA's
// namespace.
#pragma once

#include "cpu/sums.h"
#include "cpu/tiles.h"

inline void add_changes(const float* now, const float* before, int64_t n, ChangeLanes* to) {
  RunSums sums;
  int64_t i = 0;
  while (i + kChangeLanes <= n) {
    const int64_t end = i + kChangeRun < n ? i + kChangeRun : n;
    for (; i + kChangeLanes <= end; i += kChangeLanes) {
      for (int k = 0; k < RunSums::kVectors; ++k) {
        const int64_t at = i + k * Vec<float>::kLanes;
        const auto x = Vec<float>::load(now + at);
        sums.add(k, x, x - Vec<float>::load(before + at));
      }
    }
    sums.end_run(to);
  }
  if (i < n) add_last(now + i, before + i, n - i, to);
}

inline void add_changes(const double* now, const double* before, int64_t n, ChangeLanes* to) {
  for (int64_t i = 0; i < n; ++i) {
    const double moved = now[i] - before[i];
    to->param[i % kChangeLanes] += now[i] * now[i];
    to->update[i % kChangeLanes] += moved * moved;
  }
}

inline void keep(const Stream& param, int64_t first, int64_t count, void* numbers) {
  if (param.dtype == DType::f64) {
    const char* const data = param.data + first * item_size(param.dtype);
    return decode_all<double>(data, static_cast<double*>(numbers), count);
  }
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
  static_assert(kTile % kChangeRun == 0);
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
