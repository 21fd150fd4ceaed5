// cuda/: the same updates and norms on a GPU.
//
// What the kernels are told: tables of tensors, in the arguments of a launch or in the memory of
// the device. Plain structs, the same for the host and every device.
#pragma once

#include <string>

#include "engine/job.h"
#include "engine/verdict.h"

namespace fusedopt {
namespace cuda {

constexpr int kThreads = 256;           // in a block
constexpr int64_t kTile = 4096;         // elements that a block of threads updates at a time
constexpr int kNormLanes = 16;          // threads that share a block of a norm
constexpr int kMaxScalars = 9;          // of a rule
constexpr int64_t kSmallBytes = 4096;   // the arguments that every CUDA takes,
constexpr int64_t kLargeBytes = 32760;  // and that CUDA 12.1 and later take

// What the norm decided, for all kernels of the step after it.
struct Decision {
  double factor;
  float factor_f32;
  int32_t skipped;
};

// The scalars of a rule in compute precision, and what its gradient is multiplied by.
template <class T>
struct Folded {
  T scalars[kMaxScalars];
  T grad_scale;
};

// A tensor of a norm.
struct NormItem {
  const char* data;
  int64_t numel;
  int64_t begin;  // the number of its first block, over all items of all launches
  DType dtype;
};

// A parameter to be updated. All streams are arrays in one order.
struct UpdateItem {
  char* data[kMaxStreams];
  int64_t numel;
  int64_t begin;   // the number of its first tile, over the items of this launch
  int32_t folded;  // the index of its scalars
  DType dtypes[kMaxStreams];
};

// A parameter whose scalars depend on a learning rate or a count of steps that the device has.
struct FoldItem {
  float* step;     // steps taken so far, to be advanced; null: the host knows t
  const void* lr;  // null: the host knows it
  double host_lr, t;
  int32_t scalars;  // the index of the others, in double
  bool lr_is_double;
};

// The arguments of one launch: items, and behind what head several of them share. Both lie in
// `room` if there is space for them, and else in the memory of the device.
template <class Item, int64_t kBytes>
struct Args {
  const Item* items;         // null: they are in `room`, behind the head
  const char* head;          // null: it is in `room`. Of updates and folds: the scalars
  void* results;             // of norms: the blocks' sums; of folds: the scalars for the update
  const Decision* decision;  // null: nothing was decided
  int64_t item_count;
  int64_t units;       // blocks of a norm, tiles of an update
  int64_t head_bytes;  // of `room`
  alignas(8) char room[kBytes - 56];

  FUSEDOPT_HD const Item* begin() const {
    return items ? items : reinterpret_cast<const Item*>(room + head_bytes);
  }
  template <class Entry>
  FUSEDOPT_HD const Entry* entries() const {
    return reinterpret_cast<const Entry*>(head ? head : room);
  }
};

// The last of the items that begins at `unit` or before. One of no units begins where the next one
// does, which is found instead of it.
template <class Item>
FUSEDOPT_HD inline const Item& item_of(const Item* items, int64_t count, int64_t unit) {
  while (count > 1) {
    const int64_t half = count / 2;
    if (items[half].begin <= unit) {
      items += half;
      count -= half;
    } else {
      count = half;
    }
  }
  return *items;
}

// Joins what the norm adds up over all blocks, and decides what a step does.
struct FinishArgs {
  Norm norm;
  const double* blocks;
  int64_t block_count;
  double* sum;  // null, or where the sum goes
  // The rest only with a decision:
  Decision* decision;
  Scaling scaling;
  double host_sum;                             // over gradients elsewhere,
  const double* sums;                          // and more such,
  int64_t sum_count;                           // so many
  const double *unscale, *coefficient, *skip;  // null, or in place of the host's
  float* norm_result;
  float* skipped_result;  // 1 for a skipped step
};

// How the streams of an update are stored: all as float; some as float, others in 16 bits; all as
// double, which is also what they are computed in.
enum class Streams : uint8_t { f32, mixed, f64 };

// What the engine needs of a device. `room` is kSmallBytes or kLargeBytes.
struct Launch {
  int device;
  void* stream;
};
struct Kernels {
  void (*norm)(const Launch&, Norm, const void* args, int64_t bytes, int64_t units);
  void (*finish)(const Launch&, const FinishArgs&);
  void (*fold)(const Launch&, int rule, Streams streams, const void* args, int64_t bytes,
               int64_t items);
  void (*update)(const Launch&, int rule, Streams streams, const void* args, int64_t bytes,
                 int64_t units);
  std::string (*why_not)(int device);  // it or its driver does not take these kernels; or empty
  int64_t (*largest_args)();
};

}  // namespace cuda
}  // namespace fusedopt
