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

// What an update changes of a parameter, as it is added up over a block of kNormBlock elements:
// squares of what is there afterwards, and of the difference to what was there before. Element i of
// the block goes to lane i % kChangeLanes. Doubles are added up in double. Floats, masters among
// them, and what is decoded to them, in float over runs of kChangeRun elements, and then in double:
// a lane has so few of a run that it stays exact to 1e-6. (A run at the end is of whole
// kChangeLanes elements, and one more of what is left.) Scaled before they are squared, floats from
// about 1e-25 to 1e13 are exact; above, they are infinite.
constexpr int kChangeLanes = 16;
constexpr int64_t kChangeRun = 256;
constexpr float kChangeScale = 1 << 20;
struct ChangeLanes {
  double param[kChangeLanes], update[kChangeLanes];
  int64_t unmoved;  // of 16-bit parameters: equal to before
};
// An update of streams that are all floats, and what it changes, in one pass: in cache, it takes
// half of the time more that a pass of its own takes.
using UpdateAndAdd = void (*)(const double* scalars, double grad_scale, const Stream* streams,
                              int64_t first, int64_t count, const void* const* next,
                              ChangeLanes* to);

struct Rule {
  const char* name;
  int flags;  // bit i is the rule's i-th bool parameter
  int states, scalars;
  unsigned keeps, ignores;        // bit s: stream s is not stored, or not loaded
  Update update_f32, update_f64;  // by compute precision
  UpdateAndAdd update_and_add;    // null if it keeps the parameter
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

// Keeps elements [first, first + count) of a parameter as numbers: doubles of doubles, else floats;
using Keep = void (*)(const Stream& param, int64_t first, int64_t count, void* numbers);
// and adds up what has become of them: a multiple of kChangeLanes, unless they are the last ones.
using AddChange = void (*)(const Stream& param, int64_t first, int64_t count, const void* before,
                           ChangeLanes* to);

struct Kernels {
  const char* isa;
  int vector_bytes;
  const Rule* rules;
  int rule_count;
  NormBlocks norms[3];  // by Norm
  Keep keep;
  AddChange add_change;
};

}  // namespace fusedopt
