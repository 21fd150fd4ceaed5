// What the engine is asked to do, without Python: jobs, what to do to their gradients before, and
// the table of kernels that an instruction set offers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/verdict.h"

namespace fusedopt {

enum class DType : uint8_t { f32, f64, bf16, f16 };
constexpr int64_t kItemSize[] = {4, 8, 2, 2};

constexpr int kMaxStates = 3;
constexpr int kMaxStreams = 2 + kMaxStates;

// One array that a job walks, as it is stored.
struct Stream {
  char* data;
  DType dtype;
};
enum { kParam, kGrad, kFirstState };  // the order of a job's streams

// Applies one rule to `count` consecutive elements from `first` on; `scalars` are the rule's, in
// double, and the gradient is multiplied by grad_scale before the rule sees it. `next` is where
// each stream goes on afterwards, which is asked for ahead; any address will do.
using Update = void (*)(const double* scalars, double grad_scale, const Stream* streams,
                        int64_t first, int64_t count, const void* const* next);

// How far ahead of its elements a kernel asks for memory, in each stream: with the hardware's
// prefetching alone, a step out of cache took 13 % longer (benchmarks/NOTES.md).
constexpr int64_t kPrefetchBytes = 2048;
// One stream alone is read faster if it is asked for farther ahead, into the second-level cache.
constexpr int64_t kNormPrefetchBytes = 8192;

struct Rule {
  const char* name;
  int flags;  // bit i is the rule's i-th bool parameter
  int states, scalars;
  Update update_f32, update_f64;  // by compute precision
};

// What a norm adds up: |x|, x * x, or the largest |x|. In double, over blocks of kNormBlock
// elements, which are then joined in a fixed order: the same bits on every instruction set and
// device and for any number of threads. With NaN among the elements the result is NaN.
enum class Norm : uint8_t { one, two, inf };
constexpr int64_t kNormBlock = 4096;
// Block i of all is added to lane i % kNormJoin, and then lanes of equal distance to each other,
// halving their number: what a device does with as many threads.
constexpr int64_t kNormJoin = 256;

// Writes to `blocks` what the norm adds up over each block of elements [first, first + count);
// `next` is what is asked for while the last of them are read, as many bytes as there are of them
// but kNormPrefetchBytes at most; any address will do.
using NormBlocks = void (*)(const Stream& stream, int64_t first, int64_t count, const void* next,
                            double* blocks);

struct Kernels {
  const char* isa;
  int vector_bytes;
  const Rule* rules;
  int rule_count;
  NormBlocks norms[3];  // by Norm
};

// Where elements lie in streams that cannot all be walked as one array: dimensions from the
// innermost on, strides in elements.
struct Dim {
  int64_t size;
  int64_t stride[kMaxStreams];
};
using Layout = std::vector<Dim>;

struct Job {
  Update update = nullptr;
  const double* scalars = nullptr;
  double grad_scale = 1;
  int64_t numel = 0;
  int stream_count = 0;
  int64_t bytes_per_element = 0;  // of all streams together
  Stream streams[kMaxStreams];
  const Layout* layout = nullptr;       // null: every stream is one array of numel elements
  const Layout* grad_layout = nullptr;  // of the gradient in stride[0], in its own order
  const Job* then = nullptr;            // for the same elements of param, while they are in cache
};

// The kernels that this machine can run, best first.
const std::vector<const Kernels*>& available_kernels();
// Those of the named instruction set; std::runtime_error lists the valid names for any other.
const Kernels& kernels_named(const std::string& isa);
// The named rule with these flags; std::runtime_error if there is none.
const Rule& find_rule(const Kernels& kernels, const std::string& name, int flags);

class Schedule;  // schedule.h

// Each of these is one parallel region, of at most so many threads; the results do not depend on
// how many there are:
// what the norm adds up over the gradients of all jobs;
double run_norm(const Kernels& kernels, Norm norm, const std::vector<Job>& jobs, int threads);
// all updates, of gradients times `factor`;
void run_updates(const std::vector<Job>& jobs, int threads, double factor);
// the 2-norm, if that is needed, then, unless it is to be skipped, all updates. `schedule`, never
// null, is kept from step to step.
Verdict run(const Kernels& kernels, const std::vector<Job>& jobs, int threads,
            const Scaling& scaling, Schedule* schedule);

}  // namespace fusedopt
