// The kernels and the engine without Python, for machines that have none: every rule of the table
// on fixed inputs. Prints a hash of what each computed, to be compared between machines, and checks
// here what must hold on one machine: that an element's result does not depend on how many there
// are, where they lie or which thread has them, and that nothing else in memory changes.
//
//   driver [ISA...]    all that this machine can run, unless some are named; on x86-64, "wide"
//                      is one more, see wide.cpp. The exit status is 1 if a check failed.

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "chunk.h"
#include "elements.h"
#include "engine.h"

#if defined(__x86_64__)
namespace fusedopt::wide {
extern const Kernels kKernels;  // no instruction set: see wide.cpp
}
#endif

namespace machines {

using fusedopt::Job;
using fusedopt::Kernels;
using fusedopt::kGrad;
using fusedopt::kMaxStreams;
using fusedopt::kParam;
using fusedopt::Layout;
using fusedopt::Rule;
using fusedopt::Stream;

int failures = 0;

[[gnu::format(printf, 1, 2)]] void fail(const char* message, ...) {
  if (++failures > 20) return;  // enough to see what they have in common
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
  double scalars[fusedopt::kMaxScalars];
  double grad_scale;

  Work(const Rule& rule, const Kind& kind, int set) : rule(&rule), kind(&kind) {
    for (int i = 0; i < fusedopt::kMaxScalars; ++i) {
      const uint64_t random = mix(static_cast<uint64_t>(1000 * set + i));
      // In [0, 1), where a decay, a beta, an epsilon and a learning rate all make sense.
      const double scalar = std::ldexp(static_cast<double>(random >> 11), -53);
      scalars[i] = set == 0 ? scalar : std::ldexp(scalar, -static_cast<int>(random % 32));
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
const char* stored_inputs(DType dtype, int s, int64_t numel) {
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
    job_ = {work.update(), work.scalars, work.grad_scale, numel, work.streams(), {}, nullptr};
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

void update_all(const Job& job) {
  job.update(job.scalars, job.grad_scale, job.streams, 0, job.numel);
}

// ---- one kernel ---------------------------------------------------------------------------------

// Every count up to twice the most lanes there are, and the edges of a tile.
void check_counts(const Work& work, Trial& whole) {
  std::vector<int64_t> counts = {255, 256, 257, 511, 513};
  for (int64_t n = 0; n <= 67; ++n) counts.push_back(n);
  for (const int64_t n : counts) {
    // (All of them would take long under emulation.)
    for (int misalignment = n % 2; misalignment < 4; misalignment += 2) {
      const int64_t start = (37 * n + 101 * misalignment) % 1000;
      Trial trial(work, start, n, misalignment);
      trial.forbid_sentinels(true);
      update_all(trial.job());
      trial.forbid_sentinels(false);
      trial.check(whole, start, work.name() + ", misalignment " + std::to_string(misalignment));
    }
  }
}

// The same array in many calls.
void check_chopped(const Work& work, Trial& whole) {
  Trial trial(work, 0, 2000, 1);
  const Job& job = trial.job();
  for (int64_t first = 0; first < job.numel;) {
    const int64_t n = std::min<int64_t>(1 + mix(first) % 70, job.numel - first);
    job.update(job.scalars, job.grad_scale, job.streams, first, n);
    first += n;
  }
  trial.check(whole, 0, work.name() + ", in many calls");
}

// Variant 0 is a plain array cut into dimensions. In the others, the streams have gaps and their
// dimensions in different orders; in the last two, the gradient is expanded along one of them.
constexpr int kLayoutVariants = 5;
Layout make_layout(const std::vector<int64_t>& sizes, int variant) {
  const int dims = static_cast<int>(sizes.size());
  Layout layout(sizes.size());
  for (int s = 0; s < kMaxStreams; ++s) {
    int64_t stride = 1 + s * variant % 3;
    for (int d = 0; d < dims; ++d) {
      const int dim = (d + s * variant) % dims;
      layout[dim].size = sizes[dim];
      layout[dim].stride[s] = stride;
      stride *= sizes[dim];
    }
  }
  if (variant >= 3) layout[variant - 3].stride[kGrad] = 0;
  return layout;
}

// What a job with a layout must compute, before it runs: the same elements in plain arrays.
void update_as_plain(Trial& from, Trial& plain) {
  for (int s = 0; s < from.job().stream_count; ++s) {
    const std::vector<char> elements = from.elements(s);
    std::copy(elements.begin(), elements.end(), plain.array(s).at(0));
  }
  update_all(plain.job());
}

void check_layouts(const Work& work, int turn) {
  constexpr int kSizes = 4;
  const std::vector<int64_t> sizes[kSizes] = {{7, 5, 11}, {100, 3}, {1, 1}, {259}};
  const std::vector<int64_t>& chosen = sizes[turn % kSizes];
  for (int variant = 0; variant < kLayoutVariants; ++variant) {
    if (variant >= 3 && variant - 3 >= static_cast<int>(chosen.size())) continue;
    Trial trial(work, make_layout(chosen, variant));
    Trial plain(work, 0, trial.job().numel, 0);
    update_as_plain(trial, plain);
    trial.forbid_sentinels(true);
    fusedopt::run({trial.job()}, 1);
    trial.forbid_sentinels(false);
    trial.check(plain, 0,
                work.name() + ", " + std::to_string(chosen.size()) + " dimensions, variant " +
                    std::to_string(variant));
  }
}

uint64_t fnv1a(uint64_t hash, uint64_t bits, int64_t bytes) {
  for (int64_t b = 0; b < bytes; ++b) hash = (hash ^ (bits >> 8 * b & 0xff)) * 0x100000001b3;
  return hash;
}
constexpr uint64_t kFnvStart = 0xcbf29ce484222325;

uint64_t hash_of(uint64_t hash, Trial& trial) {
  for (int s = 0; s < trial.job().stream_count; ++s) {
    Array& array = trial.array(s);
    for (int64_t i = 0; i < array.numel(); ++i) {
      hash = fnv1a(hash, canonical(array.get(i), array.dtype()), item_size(array.dtype()));
    }
  }
  return hash;
}

// ---- many jobs at once --------------------------------------------------------------------------

// All of the work in one call: sizes around that of a piece among many small ones, and layouts.
void check_jobs(const std::deque<Work>& all, std::deque<Trial>& wholes, int threads, int turn) {
  std::deque<Trial> trials, plains;
  std::vector<Trial*> expected;
  std::vector<Job> jobs;
  for (size_t w = 0; w < all.size(); ++w) {
    const int64_t piece = wholes[w].job().numel - 1;
    const int64_t sizes[] = {piece - 1, 0, piece, 1, piece + 1, 17, 1000, 257};
    trials.emplace_back(all[w], 0, sizes[(w + turn) % 8], static_cast<int>(w % 4));
    expected.push_back(&wholes[w]);
    if ((w + turn) % 29 == 0) {
      const int variant = static_cast<int>(w) % kLayoutVariants;
      trials.emplace_back(all[w], make_layout({13, piece / 60, 5}, variant));
      plains.emplace_back(all[w], 0, trials.back().job().numel, 0);
      update_as_plain(trials.back(), plains.back());
      expected.push_back(&plains.back());
    }
  }
  for (Trial& trial : trials) jobs.push_back(trial.job());
  fusedopt::run(jobs, threads);
  for (size_t t = 0; t < trials.size(); ++t) {
    trials[t].check(
        *expected[t], 0,
        "job " + std::to_string(t) + " of many, " + std::to_string(threads) + " threads");
  }
}

// ---- codecs -------------------------------------------------------------------------------------

// Pairs of elements of two dtypes, and their sums in the first one.
struct Sums {
  DType param, grad;
  std::vector<uint64_t> params, grads, expected;

  Sums(DType param, DType grad) : param(param), grad(grad) {}
  void add(uint64_t param_bits, uint64_t grad_bits) {
    params.push_back(param_bits);
    grads.push_back(grad_bits);
    double sum = value(param_bits, param) + value(grad_bits, grad);
    // In double precision, 16-bit elements go through float.
    if (grad == f64 && item_size(param) == 2) sum = value(nearest(sum, f32), f32);
    expected.push_back(nearest(sum, param));
  }
  // The element converted to the dtype of the parameter: -0 + x is x, of zeros too.
  void convert(uint64_t bits) { add(format(param).sign(), bits); }
};

// Every 16-bit element; and around every one of them, those on which rounding to 16 bits turns.
void add_sums_of_half(DType half, std::vector<Sums>& all) {
  Sums to_f32(f32, half), to_f64(f64, half), from_f32(half, f32), from_f64(half, f64);
  Sums in_half(half, half);
  const Format f = format(half);
  for (uint64_t bits = 0; bits < 65536; ++bits) {
    to_f32.convert(bits);
    to_f64.convert(bits);
    const uint64_t magnitude = bits & (f.sign() - 1);
    if (magnitude >= f.infinity()) continue;
    // Above the largest element, too, as if there were another: from there on it is infinity.
    const double x = value(bits, half);
    const double half_step = magnitude + 1 < f.infinity() ? (value(bits + 1, half) - x) / 2
                                                          : (x - value(bits - 1, half)) / 2;
    const uint64_t m32 = nearest(x + half_step, f32), m64 = nearest(x + half_step, f64);
    const uint64_t step = nearest(half_step, half);
    from_f32.convert(nearest(x, f32));
    for (const int64_t near : {-1, 0, 1}) {
      from_f32.convert(m32 + near);
      from_f64.convert(m64 + near);
      // (The smallest subnormals have no half.)
      if ((step & (f.sign() - 1)) > 1) in_half.add(bits, step + near);
    }
  }
  for (uint64_t i = 0; i < 50000; ++i) from_f32.convert(mix(i) >> 32);
  for (uint64_t i = 0; i < 20000; ++i) from_f64.convert(mix(i));
  all.insert(all.end(), {to_f32, to_f64, from_f32, from_f64, in_half});
}

std::vector<Sums> make_sums() {
  std::vector<Sums> all;
  add_sums_of_half(bf16, all);
  add_sums_of_half(f16, all);
  Sums to_f64(f64, f32), to_f32(f32, f64);
  for (uint64_t i = 0; i < 20000; ++i) {
    to_f64.convert(mix(i) >> 32);
    to_f32.convert(mix(i));
    // Half-way between two floats, and next to it.
    const uint64_t half_way = nearest(value(mix(i) >> 32, f32), f64) | 1u << 28;
    for (const int64_t near : {-1, 0, 1}) to_f32.convert(half_way + near);
  }
  all.insert(all.end(), {to_f64, to_f32});
  return all;
}

// The rule "sgd" with lr -1 adds the gradient to the parameter.
void check_sums(const Rule& sgd, const Sums& sums) {
  const int64_t n = static_cast<int64_t>(sums.params.size());
  Array param(sums.param, n, 0), grad(sums.grad, n, 1);
  for (int64_t i = 0; i < n; ++i) {
    param.set(i, sums.params[i]);
    grad.set(i, sums.grads[i]);
  }
  const double scalars[] = {/*weight_decay=*/0, /*lr=*/-1};
  const Stream streams[] = {{param.at(0), param.dtype()}, {grad.at(0), grad.dtype()}};
  const bool in_double = sums.param == f64 || sums.grad == f64;
  (in_double ? sgd.update_f64 : sgd.update_f32)(scalars, 1, streams, 0, n);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t got = canonical(param.get(i), param.dtype());
    if (got == sums.expected[i]) continue;
    fail("%s %llx + %s %llx is %llx, expected %llx", name(sums.param),
         static_cast<unsigned long long>(sums.params[i]), name(sums.grad),
         static_cast<unsigned long long>(sums.grads[i]), static_cast<unsigned long long>(got),
         static_cast<unsigned long long>(sums.expected[i]));
    return;
  }
}

// ---- one instruction set ------------------------------------------------------------------------

void check_isa(const Kernels& kernels, const std::vector<Sums>& sums) {
  std::printf("isa %s\n", kernels.isa);
  for (const Sums& each : sums) check_sums(fusedopt::find_rule(kernels, "sgd", 0), each);
  std::deque<Work> all;
  std::deque<Trial> wholes;  // one element more than a piece, for every work
  uint64_t total = kFnvStart;
  for (int r = 0; r < kernels.rule_count; ++r) {
    for (const Kind& kind : kKinds) {
      uint64_t hash = kFnvStart;
      for (const int set : {0, 1}) {
        const Work& work = all.emplace_back(kernels.rules[r], kind, set);
        const int64_t piece = fusedopt::piece_elements(Trial(work, 0, 0, 0).job());
        Trial& whole = wholes.emplace_back(work, 0, piece + 1, 0);
        update_all(whole.job());
        check_counts(work, whole);
        check_chopped(work, whole);
        check_layouts(work, static_cast<int>(all.size()));
        hash = hash_of(hash, whole);
      }
      std::printf("%s %016llx\n", all.back().name().c_str(), static_cast<unsigned long long>(hash));
      total = fnv1a(total, hash, 8);
    }
  }
  int turn = 0;
  for (const int threads : {1, 2, 3, 8}) check_jobs(all, wholes, threads, turn++);
  std::printf("total %016llx\n", static_cast<unsigned long long>(total));
  std::fflush(stdout);
}

int run_all(const std::vector<std::string>& names) {
  std::vector<const Kernels*> chosen;
  if (names.empty()) chosen = fusedopt::available_kernels();
  for (const std::string& isa : names) {
#if defined(__x86_64__)
    if (isa == "wide") {
      chosen.push_back(&fusedopt::wide::kKernels);
      continue;
    }
#endif
    chosen.push_back(&fusedopt::kernels_named(isa));
  }
  std::printf("default %s\navailable", fusedopt::available_kernels().front()->isa);
  for (const Kernels* kernels : fusedopt::available_kernels()) std::printf(" %s", kernels->isa);
  std::printf("\n");
  std::fflush(stdout);
  const std::vector<Sums> sums = make_sums();
  for (const Kernels* kernels : chosen) {
    const int before = failures;
    check_isa(*kernels, sums);
    if (failures > before) {
      std::fprintf(stderr, "%d checks failed with ISA %s\n", failures - before, kernels->isa);
    }
  }
  return failures ? 1 : 0;
}

}  // namespace machines

int main(int argc, char** argv) {
  try {
    return machines::run_all({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
