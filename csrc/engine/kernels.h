// What an instruction set offers: kernels, each for one rule, and for norms.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numeric/dtype.h"
#include "numeric/rows.h"

namespace fusedopt {

constexpr int kMaxStates = 3;
constexpr int kMaxStreams = 2 + kMaxStates;

// One array that a job walks, as it is stored; what takes two arrays has its second one, too.
struct Stream {
  char* data;
  DType dtype;
  char* second = nullptr;
};
enum { kParam, kGrad, kFirstState };  // the order of a job's streams

// Which elements of a whole parameter these are, for streams that have random bits or blocks.
struct Origin {
  uint32_t key = 0, draw = 0;  // of its random bits: whose, and in which step
  int64_t first = 0;           // elements of the whole parameter before the first one of here
  Rows rows;
};

// Applies one rule to `count` consecutive elements from `first` on, in whole blocks where streams
// have blocks; `scalars` are the rule's, in double, and the gradient is multiplied by grad_scale
// before the rule sees it. `next` is where each stream goes on afterwards, which is asked for
// ahead; any address will do.
using Update = void (*)(const double* scalars, double grad_scale, const Stream* streams,
                        const Origin& origin, int64_t first, int64_t count,
                        const void* const* next);

// How far ahead a norm asks for memory, into the second-level cache: one stream alone is read
// faster if it is asked for farther ahead than those of an update.
constexpr int64_t kNormPrefetchBytes = 8192;

struct Rule {
  const char* name;
  int flags;  // bit i is the rule's i-th bool parameter
  int states, scalars;
  unsigned keeps, ignores;        // bit s: stream s is not stored, or not loaded
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

}  // namespace fusedopt
