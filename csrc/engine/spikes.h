// Which norms of gradients are spikes, by the norms of the steps before: the same text on the host
// and on a device. Readable spec: judge() in python/fusedopt/_spikes.py.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__
#else
#define FUSEDOPT_HD
#endif

namespace fusedopt {

// What limits a norm. `norms` has those of the last `size` steps that were accepted, in a ring,
// then how many were accepted in all, then how many were rejected in a row.
struct Spikes {
  double* norms = nullptr;  // null: nothing limits any
  int64_t size = 0;
  double warmup = 0, patience = 0, sigmas = 0;
  double threshold = HUGE_VAL;
  bool clips = false;  // and does not skip

  FUSEDOPT_HD double& accepted() const { return norms[size]; }
  FUSEDOPT_HD double& rejected() const { return norms[size + 1]; }
};

struct Judgement {
  double limit = HUGE_VAL;  // what a norm may be
  double entry = 0;         // what enters the ring; 0: nothing does
  bool is_spike = false;
  bool is_rejected = false;  // by the ring: the threshold does not count
  bool begins_anew = false;  // for too many were
};

// The sum of f(0), f(1), ..., f(count - 1): every sixteenth one, then halves of those.
template <class F>
FUSEDOPT_HD double sum_in_lanes(int64_t count, F f) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  for (int64_t first = 0; first < count; first += kLanes) {
#if defined(__CUDACC__)
#pragma unroll  // so that all are loaded at once
#endif
    for (int lane = 0; lane < kLanes; ++lane) {
      if (first + lane < count) lanes[lane] += f(first + lane);
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The mean of the norms in the ring plus so many standard deviations.
FUSEDOPT_HD inline double limit_of_ring(const Spikes& spikes) {
  if (!(spikes.accepted() >= spikes.warmup)) return HUGE_VAL;
  const int64_t size = spikes.size;
  const double count =
      spikes.accepted() < static_cast<double>(size) ? spikes.accepted() : static_cast<double>(size);
  const auto filled = static_cast<int64_t>(count);
  const double mean = sum_in_lanes(filled, [&](int64_t i) { return spikes.norms[i]; }) / count;
  const double squares = sum_in_lanes(filled, [&](int64_t i) {
    const double away = spikes.norms[i] - mean;
    return away * away;
  });
  const double deviation = sqrt(squares / (count - 1)), least = mean * 0.01;
  return mean + spikes.sigmas * (deviation > least ? deviation : least);
}

FUSEDOPT_HD inline Judgement judge(const Spikes& spikes, double norm) {
  Judgement judgement;
  if (!(norm > 0 && norm < HUGE_VAL)) return judgement;  // nor NaN
  const double usual = limit_of_ring(spikes);
  judgement.limit = usual < spikes.threshold ? usual : spikes.threshold;
  judgement.is_spike = norm > judgement.limit;
  if (!judgement.is_spike) {
    judgement.entry = norm;
  } else if (spikes.clips) {
    judgement.entry = judgement.limit;
  } else if (norm <= spikes.threshold) {
    judgement.begins_anew = spikes.rejected() >= spikes.patience;
    judgement.is_spike = judgement.is_rejected = !judgement.begins_anew;
    if (judgement.begins_anew) judgement.entry = norm;
  }
  return judgement;
}

// Once the step is made, or skipped for this reason.
FUSEDOPT_HD inline void remember(const Spikes& spikes, const Judgement& judgement) {
  if (judgement.is_rejected) spikes.rejected() += 1;
  if (judgement.entry == 0) return;
  if (judgement.begins_anew) spikes.accepted() = 0;
  spikes.norms[static_cast<int64_t>(spikes.accepted()) % spikes.size] = judgement.entry;
  spikes.accepted() += 1;
  spikes.rejected() = 0;
}

}  // namespace fusedopt
