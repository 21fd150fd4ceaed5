// Sums of squares: of what a parameter is, and of how far it has moved. Included inside the ISA's
// namespace.
#pragma once

#include "numeric/vec.h"

// Of one run of floats: element i in lane i % kChangeLanes, whatever a register holds.
struct RunSums {
  static constexpr int kVectors = kChangeLanes / Vec<float>::kLanes;
  Vec<float> param[kVectors] = {}, update[kVectors] = {};

  // Vector k of some kChangeLanes elements.
  FUSEDOPT_FN void add(int k, Vec<float> now, Vec<float> moved) {
    const Vec<float> x = now * kChangeScale, u = moved * kChangeScale;
    param[k] = param[k] + x * x;
    update[k] = update[k] + u * u;
  }

  FUSEDOPT_FN void end_run(ChangeLanes* to) {
    for (int k = 0; k < kVectors; ++k) {
      add_to(to->param + k * Vec<float>::kLanes, param[k]);
      add_to(to->update + k * Vec<float>::kLanes, update[k]);
      param[k] = update[k] = Vec<float>{};
    }
  }

 private:
  FUSEDOPT_FN static void add_to(double* lanes, const Vec<float>& sums) {
    float numbers[Vec<float>::kLanes];
    sums.store(numbers);
    constexpr int kDoubles = Vec<double>::kLanes;
    for (int i = 0; i < Vec<float>::kLanes; i += kDoubles) {
      const Vec<double> x = load_as_double(numbers + i) * (1 / double{kChangeScale * kChangeScale});
      (Vec<double>::load(lanes + i) + x).store(lanes + i);
    }
  }
};

// A run of less than kChangeLanes elements, which all others come before.
inline void add_last(const float* now, const float* before, int64_t n, ChangeLanes* to) {
  float x[kChangeLanes] = {}, was[kChangeLanes] = {};
  std::memcpy(x, now, static_cast<size_t>(n) * sizeof(float));
  std::memcpy(was, before, static_cast<size_t>(n) * sizeof(float));
  RunSums sums;
  for (int k = 0; k < RunSums::kVectors; ++k) {
    const auto a = Vec<float>::load(x + k * Vec<float>::kLanes);
    sums.add(k, a, a - Vec<float>::load(was + k * Vec<float>::kLanes));
  }
  sums.end_run(to);
}
