// Which kernels this machine can run, and running them: one parallel region over all pieces.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "chunk.h"
#include "engine.h"

namespace fusedopt {

// ---- the instruction sets -----------------------------------------------------------------------

// FUSEDOPT_ISAS, from CMakeLists.txt, is FUSEDOPT_EACH(name) for each line of the ISA table.
#define FUSEDOPT_EACH(isa)       \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
FUSEDOPT_ISAS
#undef FUSEDOPT_EACH

static bool runs(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("f16c");
  }
  if (!std::strcmp(isa, "avx2")) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  }
#endif
  (void)isa;
  return true;
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> available = [] {
    std::vector<const Kernels*> found;
#define FUSEDOPT_EACH(isa) \
  if (runs(#isa)) found.push_back(&isa::kKernels);
    FUSEDOPT_ISAS
#undef FUSEDOPT_EACH
    return found;
  }();
  return available;
}

const Kernels& kernels_named(const std::string& isa) {
  std::string valid;
  for (const Kernels* kernels : available_kernels()) {
    if (isa == kernels->isa) return *kernels;
    valid += std::string(valid.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::runtime_error("FUSEDOPT_ISA='" + isa +
                           "' names no instruction set that this machine and this build have; "
                           "expected one of: " +
                           valid);
}

const Rule& find_rule(const Kernels& kernels, const std::string& name, int flags) {
  for (const Rule* rule = kernels.rules; rule != kernels.rules + kernels.rule_count; ++rule) {
    if (name == rule->name && rule->flags == flags) return *rule;
  }
  throw std::runtime_error("no rule '" + name + "' with flags " + std::to_string(flags));
}

// ---- one piece ----------------------------------------------------------------------------------

// Copies `count` elements of `size` bytes between two strided places.
static void copy_strided(const char* from, int64_t from_stride, char* to, int64_t to_stride,
                         int64_t count, int64_t size) {
  const auto copy = [&](auto word) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(&word, from + i * from_stride * size, sizeof(word));
      std::memcpy(to + i * to_stride * size, &word, sizeof(word));
    }
  };
  switch (size) {
    case 2: return copy(uint16_t{});
    case 4: return copy(uint32_t{});
    default: return copy(uint64_t{});
  }
}

// A piece of a job with a layout: gathered into small arrays, updated there, scattered back.
static void run_strided(const Job& job, int64_t first, int64_t count) {
  constexpr int64_t kTile = 256;
  alignas(64) char scratch[kMaxStreams][kTile * sizeof(double)];
  Stream tile[kMaxStreams];
  for (int s = 0; s < job.stream_count; ++s) tile[s] = {scratch[s], job.streams[s].dtype};
  for (const int64_t end = first + count; first < end; first += kTile) {
    const int64_t n = std::min(end - first, kTile);
    const auto copy_streams = [&](bool gather) {
      walk(*job.layout, first, n, [&](int64_t at, const int64_t* offsets, int64_t run) {
        for (int s = 0; s < job.stream_count; ++s) {
          const int64_t size = kItemSize[static_cast<int>(tile[s].dtype)];
          const int64_t stride = (*job.layout)[0].stride[s];
          char* far = job.streams[s].data + offsets[s] * size;
          char* near = tile[s].data + at * size;
          if (gather) {
            copy_strided(far, stride, near, 1, run, size);
          } else if (s != kGrad) {
            copy_strided(near, 1, far, stride, run, size);
          }
        }
      });
    };
    copy_streams(/*gather=*/true);
    job.update(job.scalars, job.grad_scale, tile, 0, n);
    copy_streams(/*gather=*/false);
  }
}

static void run_piece(const Piece& piece) {
  const Job& job = *piece.job;
  if (job.layout) return run_strided(job, piece.first, piece.count);
  job.update(job.scalars, job.grad_scale, job.streams, piece.first, piece.count);
}

// Asks for the beginning of a piece: the processor finds the rest of each array by itself.
static void prefetch(const Piece& piece) {
  if (piece.job->layout) return;  // its elements lie elsewhere
  constexpr int64_t kBytes = 1024;
  for (int s = 0; s < piece.job->stream_count; ++s) {
    const int64_t size = kItemSize[static_cast<int>(piece.job->streams[s].dtype)];
    const char* begin = piece.job->streams[s].data + piece.first * size;
    const char* end = begin + std::min(piece.count * size, kBytes);
    for (const char* line = begin; line < end; line += 64) __builtin_prefetch(line);
  }
}

// ---- all pieces ---------------------------------------------------------------------------------

// The threads of a parent's pool do not exist in a forked child, and a parallel region there would
// wait for them for ever.
static std::atomic<bool> forked{false};
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
static const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// Two parameters may be views of the same memory. Their updates then happen in the order of the
// parameters, as they do one by one.
static bool parameters_overlap(const std::vector<Job>& jobs) {
  struct Extent {
    const char *begin, *end;
  };
  std::vector<Extent> extents;
  extents.reserve(jobs.size());
  for (const Job& job : jobs) {
    if (job.numel == 0) continue;
    const Stream& param = job.streams[kParam];
    int64_t last = job.numel - 1;
    if (job.layout) {
      last = 0;
      for (const Dim& dim : *job.layout) last += (dim.size - 1) * dim.stride[kParam];
    }
    const int64_t size = kItemSize[static_cast<int>(param.dtype)];
    extents.push_back({param.data, param.data + (last + 1) * size});
  }
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].begin < extents[i - 1].end) return true;
  }
  return false;
}

int useful_threads(const std::vector<Job>& jobs, int threads) {
  // Waking the other threads takes a few microseconds, the time of about this many bytes.
  constexpr int64_t kSerialBytes = 128 * 1024;
  int64_t bytes = 0;
  for (const Job& job : jobs) bytes += job.numel * bytes_per_element(job);
  return bytes < kSerialBytes ? 1 : threads;
}

void run(const std::vector<Job>& jobs, int threads) {
#if !defined(_OPENMP)
  threads = 1;
#endif
  if (threads <= 1 || forked || parameters_overlap(jobs)) {
    for (size_t i = 0; i < jobs.size(); ++i) {
      if (i + 1 < jobs.size()) prefetch({&jobs[i + 1], 0, jobs[i + 1].numel});
      run_piece({&jobs[i], 0, jobs[i].numel});
    }
    return;
  }
#if defined(_OPENMP)
  const std::vector<Piece> pieces = cut(jobs);
  // Piece i belongs to the thread in whose equal share of the bytes it begins.
  std::vector<size_t> begin(static_cast<size_t>(threads) + 1, pieces.size());
  int64_t total = 0;
  for (const Job& job : jobs) total += job.numel * bytes_per_element(job);
  int64_t before = 0;
  int next = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    while (next < threads && before >= total / threads * next) begin[next++] = i;
    before += pieces[i].count * bytes_per_element(*pieces[i].job);
  }
#pragma omp parallel num_threads(threads)
  {
    // The runtime may grant fewer threads than were asked for.
    for (int share = omp_get_thread_num(); share < threads; share += omp_get_num_threads()) {
      for (size_t i = begin[share]; i < begin[share + 1]; ++i) {
        if (i + 1 < begin[share + 1]) prefetch(pieces[i + 1]);
        run_piece(pieces[i]);
      }
    }
  }
#endif
}

}  // namespace fusedopt
