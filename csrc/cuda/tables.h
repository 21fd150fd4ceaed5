// cuda/: the same updates and norms on a GPU.
//
// What the kernels are told: tables of tensors, in the arguments of a launch or in the memory of
// the device. Plain structs, the same for the host and every device.
#pragma once

#include <algorithm>
#include <cstring>
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
  int32_t folded;  // where its scalars are, in bytes,
  int32_t parts;   // and what its streams are stored in beside arrays of numbers
  DType dtypes[kMaxStreams];
};

// Second arrays, and what random bits come of.
struct Parts {
  char* second[kMaxStreams];
  int64_t* rounding;      // key * 2**32 + draw, to be advanced; or null
  int64_t first_element;  // elements of the whole parameter before these
  Rows rows;
  uint32_t other_key;  // to be joined to it
  int32_t draws_back;  // 1: what takes the bits of the same draw has been launched before
};

// A parameter whose scalars depend on a learning rate or a count of steps that the device has.
struct FoldItem {
  float* step;     // steps taken so far, to be advanced; null: the host knows t
  const void* lr;  // null: the host knows it
  double host_lr, t;
  char* result;    // the scalars for the update, in its compute precision
  int32_t folded;  // where the others are, in double
  int16_t rule;
  bool lr_is_double, in_double;
};

// The arguments of one launch: a table of items behind what several of them share. It lies in
// `room` if there is space, and else in the memory of the device.
template <class Item>
struct Args {
  const char* memory;        // null: the table is in `room`
  const char* scalars;       // of updates: null: they are in the table
  double* sums;              // of norms: the blocks'
  const Decision* decision;  // null: nothing was decided
  int64_t item_count;
  int64_t units;       // blocks of a norm, tiles of an update
  int64_t head_bytes;  // of the table
  alignas(8) char room[kSmallBytes - 56];

  FUSEDOPT_HD const char* table() const { return memory ? memory : room; }
  FUSEDOPT_HD const Item* begin() const {
    return reinterpret_cast<const Item*>(table() + head_bytes);
  }
  template <class Entry>
  FUSEDOPT_HD const Entry& scalars_at(int32_t at) const {
    return *reinterpret_cast<const Entry*>((scalars ? scalars : table()) + at);
  }
  FUSEDOPT_HD const Parts& parts_at(int32_t at) const {
    return *reinterpret_cast<const Parts*>(table() + at);
  }
};

// A part of a table on its way to the memory of the device, in the arguments of a launch: so a
// graph that is captured has it, too.
template <int64_t kBytes>
struct Page {
  uint64_t* to;
  int64_t count;
  uint64_t data[kBytes / 8 - 2];
};

// Calls use(page) for each page of a table, whose bytes are a multiple of 8.
template <int64_t kBytes, class Use>
void in_pages(char* to, const std::string& table, Use use) {
  Page<kBytes> page;
  for (size_t at = 0; at < table.size(); at += sizeof(page.data)) {
    const size_t bytes = std::min(sizeof(page.data), table.size() - at);
    page.to = reinterpret_cast<uint64_t*>(to + at);
    page.count = static_cast<int64_t>(bytes / 8);
    std::memcpy(page.data, table.data() + at, bytes);
    use(page);
  }
}

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
  const double* known_norm;                    // the same
  float* norm_result;
  float* skipped_result;  // 1 for a skipped step
  double* factor_result;  // or null
};

// How the streams of an update may be stored so that a kernel of its own takes them: parameter,
// gradient, states. Two last kinds of kernels take any numbers but doubles, and anything else.
constexpr DType kKinds[][kMaxStreams] = {
#define FUSEDOPT_KIND(param, grad, state0, state1) \
  {DType::param, DType::grad, DType::state0, DType::state1, DType::state1}
    FUSEDOPT_KIND(f32, f32, f32, f32),          // of every rule
    FUSEDOPT_KIND(f64, f64, f64, f64),          //
    FUSEDOPT_KIND(bf16, bf16, bf16, bf16),      // of some (kernel.cu)
    FUSEDOPT_KIND(bf16, bf16, f32, f32),        //
    FUSEDOPT_KIND(f32, bf16, f32, f32),         //
    FUSEDOPT_KIND(f16, f16, f16, f16),          //
    FUSEDOPT_KIND(bf16_split, bf16, f32, f32),  // of Adam
    FUSEDOPT_KIND(bf16_split, bf16, bf16, bf16),
    FUSEDOPT_KIND(bf16_split, bf16, e4m3, e5m3),
    FUSEDOPT_KIND(bf16_random, bf16, bf16, bf16),
    FUSEDOPT_KIND(bf16_random, bf16, e4m3, e5m3),
#undef FUSEDOPT_KIND
};
constexpr int kF64 = 1, kBFloat16 = 2, kFirstOfSome = 2, kFirstOfAdam = 6;
constexpr int kAnyNumbers = sizeof(kKinds) / sizeof(kKinds[0]), kAnyCodecs = kAnyNumbers + 1;

// What the engine needs of a device.
struct Launch {
  int device;
  void* stream;
};
struct Kernels {
  void (*write)(const Launch&, char* to, const std::string& table);
  void (*norm)(const Launch&, Norm, const Args<NormItem>&);
  void (*finish)(const Launch&, const FinishArgs&);
  void (*fold)(const Launch&, const Args<FoldItem>&);
  void (*update)(const Launch&, int rule, int kind, const Args<UpdateItem>&);
  void (*advance)(const Launch&, const Args<UpdateItem>&);  // draws of random bits
  std::string (*why_not)(int device);  // it or its driver does not take these kernels; or empty
};

}  // namespace cuda
}  // namespace fusedopt
