// What the engine is asked to do, without Python: jobs, and the table of kernels that an
// instruction set offers for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

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
// double, and the gradient is multiplied by grad_scale before the rule sees it.
using Update = void (*)(const double* scalars, double grad_scale, const Stream* streams,
                        int64_t first, int64_t count);

struct Rule {
  const char* name;
  int flags;  // bit i is the rule's i-th bool parameter
  int states, scalars;
  Update update_f32, update_f64;  // by compute precision
};

struct Kernels {
  const char* isa;
  int vector_bytes;
  const Rule* rules;
  int rule_count;
};

// Where elements lie in streams that cannot all be walked as one array: dimensions from the
// innermost on, strides in elements.
struct Dim {
  int64_t size;
  int64_t stride[kMaxStreams];
};
using Layout = std::vector<Dim>;

struct Job {
  Update update;
  const double* scalars;
  double grad_scale;
  int64_t numel;
  int stream_count;
  Stream streams[kMaxStreams];
  const Layout* layout;  // null: every stream is one array of numel elements
};

// The kernels that this machine can run, best first.
const std::vector<const Kernels*>& available_kernels();
// Those of the named instruction set; std::runtime_error lists the valid names for any other.
const Kernels& kernels_named(const std::string& isa);
// The named rule with these flags; std::runtime_error if there is none.
const Rule& find_rule(const Kernels& kernels, const std::string& name, int flags);

// How many of `threads` threads are worth waking for these jobs.
int useful_threads(const std::vector<Job>& jobs, int threads);
// Runs all jobs in one parallel region; the result does not depend on the number of threads.
void run(const std::vector<Job>& jobs, int threads);

}  // namespace fusedopt
