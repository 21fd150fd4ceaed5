// What the driver runs: a rule on streams of some dtypes, the arrays it walks, and checking them.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "elements.h"
#include "engine/job.h"

namespace machines {

using fusedopt::Job;
using fusedopt::kGrad;
using fusedopt::kMaxStreams;
using fusedopt::kParam;
using fusedopt::Layout;
using fusedopt::Rule;
using fusedopt::Stream;

inline int failures = 0;

[[gnu::format(printf, 1, 2)]] inline void fail(const char* message, ...) {
  if (++failures > 10) return;  // enough to see what they have in common
  va_list values;
  va_start(values, message);
  std::fputs("FAILED: ", stderr);
  std::vfprintf(stderr, message, values);
  std::fputc('\n', stderr);
  va_end(values);
}

// ---- arrays -------------------------------------------------------------------------------------

// `numel` elements, `misalignment` of them past the start of a cache line, between sentinels. Those
// that nobody writes are sentinels too.
class Array {
 public:
  Array(DType dtype, int64_t numel, int64_t misalignment)
      : dtype_(dtype),
        numel_(numel),
        memory_(static_cast<size_t>(numel * item_size(dtype) + 3 * kGuard), kSentinel) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    begin_ = memory_.data() + kGuard + (kGuard - start % kGuard) % kGuard +
             misalignment * item_size(dtype);
  }
  // Not to be copied, because others point into it.
  Array(const Array&) = delete;

  DType dtype() const { return dtype_; }
  int64_t numel() const { return numel_; }
  char* at(int64_t i) { return begin_ + i * item_size(dtype_); }
  uint64_t get(int64_t i) { return load(at(i), dtype_); }
  void set(int64_t i, uint64_t bits) { store(bits, at(i), dtype_); }

  static bool is_sentinel(const char* begin, const char* end) {
    return std::all_of(begin, end, [](char byte) { return byte == kSentinel; });
  }
  bool sentinels_intact() {
    return is_sentinel(memory_.data(), begin_) &&
           is_sentinel(at(numel_), memory_.data() + memory_.size());
  }

  // The sentinels may not even be read, which a build with AddressSanitizer checks.
  void forbid_sentinels(bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
    const char* const end = memory_.data() + memory_.size();
    if (forbidden) {
      ASAN_POISON_MEMORY_REGION(memory_.data(), begin_ - memory_.data());
      ASAN_POISON_MEMORY_REGION(at(numel_), end - at(numel_));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size());
    }
#else
    (void)forbidden;
#endif
  }

 private:
  static constexpr int64_t kGuard = 64;
  static constexpr char kSentinel = 0x5a;

  DType dtype_;
  int64_t numel_;
  std::vector<char> memory_;
  char* begin_;
};

// ---- what is computed ---------------------------------------------------------------------------

// The dtypes of a rule's streams.
struct Kind {
  DType streams[kMaxStreams];
  std::string name() const {
    std::string text = machines::name(streams[0]);
    if (std::all_of(streams, streams + kMaxStreams, [&](DType d) { return d == streams[0]; })) {
      return text;
    }
    for (int s = 1; s < kMaxStreams; ++s) text += std::string("/") + machines::name(streams[s]);
    return text;
  }
};

constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
constexpr Kind kKinds[] = {
    {{f32, f32, f32, f32, f32}},   {{f64, f64, f64, f64, f64}},    {{bf16, bf16, bf16, bf16, bf16}},
    {{f16, f16, f16, f16, f16}},   {{f32, f32, bf16, bf16, bf16}}, {{f32, bf16, bf16, f32, f16}},
    {{bf16, f32, f32, bf16, f32}}, {{f16, bf16, f32, f16, bf16}},  {{f64, f32, bf16, f16, f32}},
};

// A rule on streams of some dtypes, with one of two sets of scalars.
struct Work {
  const Rule* rule;
  const Kind* kind;
  std::vector<double> scalars;
  double grad_scale;

  Work(const Rule& rule, const Kind& kind, int set) : rule(&rule), kind(&kind) {
    for (int i = 0; i < rule.scalars; ++i) {
      const uint64_t random = mix(static_cast<uint64_t>(1000 * set + i));
      // In [0, 1), where a decay, a beta, an epsilon and a learning rate all make sense.
      const double scalar = std::ldexp(static_cast<double>(random >> 11), -53);
      scalars.push_back(set == 0 ? scalar : std::ldexp(scalar, -static_cast<int>(random % 32)));
    }
    grad_scale = set == 0 ? 1 : -0.7;
  }

  int streams() const { return fusedopt::kFirstState + rule->states; }
  fusedopt::Update update() const {
    return kind->streams[kParam] == f64 ? rule->update_f64 : rule->update_f32;
  }
  std::string name() const {
    return std::string(rule->name) + " " + std::to_string(rule->flags) + " " + kind->name();
  }
};

// The inputs of one stream, as it stores them.
inline const char* stored_inputs(DType dtype, int s, int64_t numel) {
  static std::vector<char> stored[4][kMaxStreams];
  std::vector<char>& bytes = stored[static_cast<int>(dtype)][s];
  const int64_t size = item_size(dtype);
  for (int64_t i = static_cast<int64_t>(bytes.size()) / size; i < numel; ++i) {
    bytes.resize(static_cast<size_t>((i + 1) * size));
    store(input(dtype, s, i), &bytes[i * size], dtype);
  }
  return bytes.data();
}

// One job and the arrays it walks.
class Trial {
 public:
  // Elements [start, start + numel) of the inputs, in plain arrays.
  Trial(const Work& work, int64_t start, int64_t numel, int misalignment) : Trial(work, numel) {
    for (int s = 0; s < job_.stream_count; ++s) {
      Array& array = add_array(s, numel, misalignment * (s + 1) % 4);  // 0: all aligned alike
      const int64_t size = item_size(array.dtype());
      std::copy_n(stored_inputs(array.dtype(), s, start + numel) + start * size, numel * size,
                  array.at(0));
    }
  }

  // Every place of `layout` has the input of that index.
  Trial(const Work& work, Layout layout) : Trial(work, 1) {
    layout_ = std::move(layout);
    job_.layout = &layout_;
    for (const fusedopt::Dim& dim : layout_) job_.numel *= dim.size;
    for (int s = 0; s < job_.stream_count; ++s) {
      for (int64_t i = 0; i < job_.numel; ++i) {
        int64_t place = 0, rest = i;
        for (const fusedopt::Dim& dim : layout_) {
          place += rest % dim.size * dim.stride[s];
          rest /= dim.size;
        }
        places_[s].push_back(place);
      }
      Array& array = add_array(s, places_[s].back() + 1, s % 4);
      for (const int64_t place : places_[s]) {
        store(input(array.dtype(), s, place), array.at(place), array.dtype());
      }
    }
  }
  Trial(const Trial&) = delete;

  const Job& job() const { return job_; }
  Array& array(int s) { return arrays_[s]; }

  void forbid_sentinels(bool forbidden) {
    for (Array& array : arrays_) array.forbid_sentinels(forbidden);
  }

  // Stream s as a plain array.
  std::vector<char> elements(int s) {
    Array& array = arrays_[s];
    const int64_t size = item_size(array.dtype());
    if (!job_.layout) return {array.at(0), array.at(job_.numel)};
    std::vector<char> bytes;
    for (const int64_t place : places_[s]) {
      bytes.insert(bytes.end(), array.at(place), array.at(place) + size);
    }
    return bytes;
  }

  // Fails unless the gradient is still the inputs from `start` on.
  void check_gradient(int64_t start, const std::string& what) {
    Array& grad = arrays_[kGrad];
    const int64_t end = start + job_.numel;
    const char* const inputs = stored_inputs(grad.dtype(), kGrad, end);
    if (!std::equal(grad.at(0), grad.at(job_.numel), inputs + start * item_size(grad.dtype()))) {
      fail("%s: the gradient was overwritten", what.c_str());
    }
  }

  // Fails unless every element is what `expected` has for it from its element `start` on, and
  // nothing else has changed.
  void check(Trial& expected, int64_t start, const std::string& what) {
    for (int s = 0; s < job_.stream_count; ++s) {
      Array& array = arrays_[s];
      const DType dtype = array.dtype();
      if (!array.sentinels_intact() || !gaps_intact(s)) {
        fail("%s: stream %d: memory that is no element was overwritten", what.c_str(), s);
      }
      const std::vector<char> got = elements(s);
      if (std::equal(got.begin(), got.end(), expected.arrays_[s].at(start))) continue;
      for (int64_t i = 0; i < job_.numel; ++i) {
        const uint64_t is = canonical(load(&got[i * item_size(dtype)], dtype), dtype);
        const uint64_t should = canonical(load(expected.arrays_[s].at(start + i), dtype), dtype);
        if (is == should) continue;
        fail("%s: stream %d, element %lld of %lld: %llx, expected %llx", what.c_str(), s,
             static_cast<long long>(i), static_cast<long long>(job_.numel),
             static_cast<unsigned long long>(is), static_cast<unsigned long long>(should));
        break;
      }
    }
  }

 private:
  Trial(const Work& work, int64_t numel) : kind_(*work.kind) {
    job_.update = work.update();
    job_.scalars = work.scalars.data();
    job_.grad_scale = work.grad_scale;
    job_.numel = numel;
    job_.stream_count = work.streams();
    for (int s = 0; s < job_.stream_count; ++s)
      job_.bytes_per_element += item_size(kind_.streams[s]);
  }

  Array& add_array(int s, int64_t numel, int64_t misalignment) {
    Array& array = arrays_.emplace_back(kind_.streams[s], numel, misalignment);
    job_.streams[s] = {array.at(0), array.dtype()};
    return array;
  }

  // Between the elements of a layout there are sentinels as well.
  bool gaps_intact(int s) {
    if (!job_.layout) return true;
    Array& array = arrays_[s];
    std::vector<bool> used(static_cast<size_t>(array.numel()));
    for (const int64_t place : places_[s]) used[place] = true;
    for (int64_t i = 0; i < array.numel(); ++i) {
      if (!used[i] && !Array::is_sentinel(array.at(i), array.at(i + 1))) return false;
    }
    return true;
  }

  Kind kind_;
  Layout layout_;
  Job job_;
  std::deque<Array> arrays_;
  std::vector<int64_t> places_[kMaxStreams];  // of a layout's elements
};

// Elements [first, first + count); what comes next is of no consequence.
inline void update_some(const Job& job, int64_t first, int64_t count) {
  const void* next[kMaxStreams];
  for (int s = 0; s < job.stream_count; ++s) next[s] = job.streams[s].data;
  job.update(job.scalars, job.grad_scale, job.streams, job.origin, first, count, next);
}
inline void update_all(const Job& job) { update_some(job, 0, job.numel); }

}  // namespace machines
