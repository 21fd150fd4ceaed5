// The kernels and the engine without Python, for machines that have none: every rule of the table
// on fixed inputs. Prints a hash of what each computed, to be compared between machines, and checks
// here what must hold on one machine: that an element's result does not depend on how many there
// are, where they lie or which thread has them, and that nothing else in memory changes.
//
//   driver [ISA...]    all that this machine can run, unless some are named; "wide" is one more
//                      in some builds, see wide.cpp. The exit status is 1 if a check failed.

#include <cstdio>
#include <deque>
#include <exception>
#include <string>
#include <vector>

#include "codecs.h"
#include "cpu/dispatch.h"
#include "elements.h"
#include "engine/run.h"
#include "modes.h"
#include "trial.h"

#if defined(FUSEDOPT_WIDE)
namespace fusedopt::wide {
extern const Kernels kKernels;  // no instruction set: see wide.cpp
}
#endif

namespace machines {

using fusedopt::Kernels;

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
    update_some(job, first, n);
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

void check_layouts(const Kernels& kernels, const Work& work, int turn) {
  constexpr int kSizes = 4;
  const std::vector<int64_t> sizes[kSizes] = {{7, 5, 11}, {100, 3}, {1, 1}, {259}};
  const std::vector<int64_t>& chosen = sizes[turn % kSizes];
  for (int variant = 0; variant < kLayoutVariants; ++variant) {
    if (variant >= 3 && variant - 3 >= static_cast<int>(chosen.size())) continue;
    Trial trial(work, make_layout(chosen, variant));
    Trial plain(work, 0, trial.job().numel, 0);
    update_as_plain(trial, plain);
    trial.forbid_sentinels(true);
    fusedopt::run_updates(kernels, {trial.job()}, 1, 1);
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

// ---- norms --------------------------------------------------------------------------------------

// The inputs with a 1 for what is not finite, `misalignment` elements past a cache line.
void fill_finite(Array& array) {
  const Format f = format(array.dtype());
  for (int64_t i = 0; i < array.numel(); ++i) {
    const uint64_t bits = input(array.dtype(), kGrad, i);
    const bool finite = (bits & (f.sign() - 1)) < f.infinity();
    array.set(i, finite ? bits : static_cast<uint64_t>(f.bias()) << f.fraction_bits);
  }
}

// What each norm adds up over blocks of an array, wherever it lies; in one call and in several.
uint64_t check_norms(const Kernels& kernels) {
  constexpr int64_t kBlock = fusedopt::kNormBlock, kNumel = 3 * kBlock + 1001;
  uint64_t total = kFnvStart;
  for (const DType dtype : {f32, f64, bf16, f16}) {
    for (int norm = 0; norm < 3; ++norm) {
      std::vector<double> expected(4);
      for (int misalignment = 0; misalignment < 4; ++misalignment) {
        Array array(dtype, kNumel, misalignment);
        fill_finite(array);
        array.forbid_sentinels(true);
        std::vector<double> whole(4), parts(4);
        kernels.norms[norm]({array.at(0), dtype}, 0, kNumel, array.at(0), whole.data());
        kernels.norms[norm]({array.at(0), dtype}, 0, kBlock, array.at(0), parts.data());
        kernels.norms[norm]({array.at(0), dtype}, kBlock, kNumel - kBlock, array.at(0), &parts[1]);
        array.forbid_sentinels(false);
        if (misalignment == 0) expected = whole;
        if (whole != expected || parts != expected) {
          fail("norm %d of %s, misalignment %d", norm, name(dtype), misalignment);
        }
      }
      uint64_t hash = kFnvStart;
      for (const double& sum : expected) {
        hash = fnv1a(hash, load(reinterpret_cast<const char*>(&sum), f64), 8);
      }
      std::printf("norm %d %s %016llx\n", norm, name(dtype), static_cast<unsigned long long>(hash));
      total = fnv1a(total, hash, 8);
    }
  }
  return total;
}

// ---- many jobs at once --------------------------------------------------------------------------

// All of the work in one call: sizes around that of a piece among many small ones, and layouts.
void check_jobs(const Kernels& kernels, const std::deque<Work>& all, std::deque<Trial>& wholes,
                int threads, int turn) {
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
  for (Trial& trial : trials) {
    jobs.push_back(trial.job());
    trial.forbid_sentinels(true);
  }
  fusedopt::run_updates(kernels, jobs, threads, 1);
  for (Trial& trial : trials) trial.forbid_sentinels(false);
  for (size_t t = 0; t < trials.size(); ++t) {
    trials[t].check(
        *expected[t], 0,
        "job " + std::to_string(t) + " of many, " + std::to_string(threads) + " threads");
  }
}

// ---- one instruction set ------------------------------------------------------------------------

void check_isa(const Kernels& kernels, const std::vector<Sums>& sums) {
  std::printf("isa %s\n", kernels.isa);
  for (const Sums& each : sums) check_sums(fusedopt::find_rule(kernels, "sgd", 0), each);
  std::deque<Work> all;
  std::deque<Trial> wholes;  // one element more than a piece, for every work
  uint64_t total = check_norms(kernels);
  for (int r = 0; r < kernels.rule_count; ++r) {
    for (const Kind& kind : kKinds) {
      uint64_t hash = kFnvStart;
      for (const int set : {0, 1}) {
        const Work& work = all.emplace_back(kernels.rules[r], kind, set);
        const int64_t piece = fusedopt::piece_elements(Trial(work, 0, 0, 0).job());
        Trial& whole = wholes.emplace_back(work, 0, piece + 1, 0);
        update_all(whole.job());
        whole.check_gradient(0, work.name());
        check_counts(work, whole);
        check_chopped(work, whole);
        check_layouts(kernels, work, static_cast<int>(all.size()));
        hash = hash_of(hash, whole);
      }
      std::printf("%s %016llx\n", all.back().name().c_str(), static_cast<unsigned long long>(hash));
      total = fnv1a(total, hash, 8);
    }
  }
  const uint64_t modes = check_modes(kernels, [](uint64_t hash, const std::vector<char>& bytes) {
    for (const char byte : bytes) hash = fnv1a(hash, static_cast<unsigned char>(byte), 1);
    return hash;
  });
  std::printf("modes %016llx\n", static_cast<unsigned long long>(modes));
  total = fnv1a(total, modes, 8);
  int turn = 0;
  for (const int threads : {1, 2, 3, 8}) check_jobs(kernels, all, wholes, threads, turn++);
  std::printf("total %016llx\n", static_cast<unsigned long long>(total));
  std::fflush(stdout);
}

int run_all(const std::vector<std::string>& names) {
  std::vector<const Kernels*> chosen;
  if (names.empty()) chosen = fusedopt::available_kernels();
  for (const std::string& isa : names) {
#if defined(FUSEDOPT_WIDE)
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
