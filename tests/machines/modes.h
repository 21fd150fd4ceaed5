// Streams of two arrays, in blocks or with random bits, and the statistics of their steps: the same
// hash on every machine, and the same bytes whatever the threads, or in which order elements are
// visited.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "elements.h"
#include "engine/run.h"
#include "trial.h"

namespace machines {

struct Mode {
  const char* name;
  DType param, grad, state;  // of states without a sign, e4m3 is e5m3
};
constexpr Mode kModes[] = {
    {"float32", DType::f32, DType::f32, DType::f32},
    {"float64", DType::f64, DType::f64, DType::f64},
    {"masters, float32", DType::bf16_split, DType::bf16, DType::f32},
    {"masters, bfloat16", DType::bf16_split, DType::bf16, DType::bf16},
    {"masters, 8 bits", DType::bf16_split, DType::bf16, DType::e4m3},
    {"random, bfloat16", DType::bf16_random, DType::bf16, DType::bf16},
    {"random, 8 bits", DType::bf16_random, DType::bf16, DType::e4m3},
    {"float32, 8 bits", DType::f32, DType::f32, DType::e4m3},
    {"float16 masters", DType::f16_master, DType::f16, DType::f16},
    {"float16, random", DType::f16_random, DType::f16, DType::e4m3},
};

// What an element of the first array is by itself.
constexpr DType number_of(DType dtype) {
  return dtype == DType::bf16_split || dtype == DType::bf16_random  ? DType::bf16
         : dtype == DType::f16_master || dtype == DType::f16_random ? DType::f16
                                                                    : dtype;
}

// One job of a rule with `states` states, the second of which has no sign, in arrays of its own.
class ModeTrial {
 public:
  ModeTrial(const Rule& rule, const Mode& mode, int64_t row, int64_t numel) {
    job_.update = mode.param == DType::f64 ? rule.update_f64 : rule.update_f32;
    job_.update_and_add = rule.update_and_add;
    job_.numel = numel;
    job_.stream_count = fusedopt::kFirstState + rule.states;
    job_.origin = {0x12345678, 9, 7 * row, {row}};
    job_.bytes_per_element = 16;
    for (int i = 0; i < rule.scalars; ++i) scalars_.push_back(i % 2 ? 0.01 : 0.9);
    job_.scalars = scalars_.data();
    for (int s = 0; s < job_.stream_count; ++s) {
      const bool coded = mode.state == DType::e4m3 && s >= fusedopt::kFirstState;
      const DType dtype = s == kParam      ? mode.param
                          : s == kGrad     ? mode.grad
                          : coded && s % 2 ? DType::e5m3
                                           : mode.state;
      arrays_.emplace_back(static_cast<size_t>(numel * item_size(dtype)));
      const int64_t second = coded ? fusedopt::Rows{row}.block_of(numel - 1) + 1
                                   : numel * fusedopt::second_size(dtype);
      seconds_.emplace_back(static_cast<size_t>(second), coded ? 110 : 0);
      job_.in_blocks = job_.in_blocks || coded;
      fill(dtype, s, &arrays_.back(), &seconds_.back());
    }
    for (int s = 0; s < job_.stream_count; ++s) {
      const DType dtype = dtypes_[static_cast<size_t>(s)];
      std::vector<char>& second = seconds_[static_cast<size_t>(s)];
      job_.streams[s] = {arrays_[static_cast<size_t>(s)].data(), dtype,
                         second.empty() ? nullptr : second.data()};
    }
  }

  const Job& job() const { return job_; }
  Job& job() { return job_; }
  // All bytes, of each NaN the same.
  std::vector<std::vector<char>> all() const {
    std::vector<std::vector<char>> all = arrays_;
    all.insert(all.end(), seconds_.begin(), seconds_.end());
    for (size_t s = 0; s < dtypes_.size(); ++s) {
      if (!fusedopt::has_blocks(dtypes_[s])) make_canonical(number_of(dtypes_[s]), &all[s]);
      if (dtypes_[s] == DType::f16_master) make_canonical(DType::f32, &all[dtypes_.size() + s]);
    }
    return all;
  }

 private:
  static void make_canonical(DType dtype, std::vector<char>* elements) {
    const int64_t size = item_size(dtype);
    for (size_t i = 0; i < elements->size(); i += static_cast<size_t>(size)) {
      char* const at = elements->data() + i;
      store(canonical(load(at, dtype), dtype), at, dtype);
    }
  }

  // Numbers of many sizes, not below zero where a state has no sign.
  void fill(DType dtype, int s, std::vector<char>* array, std::vector<char>* second) {
    dtypes_.push_back(dtype);
    const bool has_no_sign = s >= fusedopt::kFirstState && s % 2;
    for (int64_t i = 0; i < job_.numel; ++i) {
      const uint64_t bits = mix(static_cast<uint64_t>(1000003 * s + i));
      const int exponent = 100 + static_cast<int>(bits % 24);
      const auto digits = static_cast<uint32_t>(bits >> 8 & 0x7fffff);
      const uint32_t sign = has_no_sign ? 0 : static_cast<uint32_t>(bits >> 40 & 1) << 31;
      const uint32_t number = sign | static_cast<uint32_t>(exponent) << 23 | digits;
      float master;
      std::memcpy(&master, &number, sizeof(master));
      if (dtype == DType::f32) {
        std::memcpy(array->data() + 4 * i, &number, 4);
      } else if (dtype == DType::f64) {
        const double wide = master;
        std::memcpy(array->data() + 8 * i, &wide, 8);
      } else if (fusedopt::has_blocks(dtype)) {
        const auto code = static_cast<uint8_t>(bits % (has_no_sign ? 240 : 120));
        (*array)[static_cast<size_t>(i)] = static_cast<char>(code);
      } else if (dtype == DType::f16_master || dtype == DType::f16_random || dtype == DType::f16) {
        const auto half = static_cast<uint16_t>(sign >> 16 | (10 + bits % 8) << 10);
        std::memcpy(array->data() + 2 * i, &half, 2);
        if (dtype == DType::f16_master) std::memcpy(second->data() + 4 * i, &master, 4);
      } else {
        const auto half = static_cast<uint16_t>(number >> 16);
        const auto rest = static_cast<int16_t>(static_cast<uint16_t>(bits >> 44));
        std::memcpy(array->data() + 2 * i, &half, 2);
        if (dtype == DType::bf16_split) std::memcpy(second->data() + 2 * i, &rest, 2);
      }
    }
  }

  Job job_;
  std::vector<double> scalars_;
  std::vector<DType> dtypes_;
  std::vector<std::vector<char>> arrays_, seconds_;
};

// Each NaN the same.
inline std::vector<char> bytes_of(const fusedopt::Sums& sums) {
  std::vector<char> bytes(sizeof(sums));
  std::memcpy(bytes.data(), &sums, sizeof(sums));
  for (size_t i = 0; i < bytes.size(); i += sizeof(double)) {
    store(canonical(load(&bytes[i], DType::f64), DType::f64), &bytes[i], DType::f64);
  }
  return bytes;
}

template <class Hash>
uint64_t check_modes(const fusedopt::Kernels& kernels, Hash hash_bytes) {
  uint64_t total = 0;
  for (int r = 0; r < kernels.rule_count; ++r) {
    const Rule& rule = kernels.rules[r];
    for (const Mode& mode : kModes) {
      for (const int64_t row : {int64_t{96}, int64_t{67}}) {
        const int64_t numel = row * 300;
        ModeTrial whole(rule, mode, row, numel);
        for (int step = 0; step < 2; ++step) update_all(whole.job());
        std::vector<char> statistics;
        for (const int threads : {1, 3}) {
          ModeTrial shared(rule, mode, row, numel);
          fusedopt::Sums sums;
          for (int step = 0; step < 2; ++step) {
            fusedopt::run_updates(kernels, {shared.job()}, threads, 1, &sums);
          }
          const std::vector<char> found = bytes_of(sums);
          if (shared.all() != whole.all() || (threads > 1 && found != statistics)) {
            fail("%s of %s, rows of %d, %d threads", mode.name, rule.name, static_cast<int>(row),
                 threads);
          }
          statistics = found;
        }
        total = hash_bytes(total, statistics);
        for (const std::vector<char>& bytes : whole.all()) total = hash_bytes(total, bytes);
      }
    }
  }
  return total;
}

}  // namespace machines
