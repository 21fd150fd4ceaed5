// From jobs on one device to launches on its current stream. Nothing here waits for the device.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda/tables.h"

namespace fusedopt {
namespace cuda {

// What a rule's scalars depend on, and where it is.
struct Clock {
  float* step = nullptr;     // on the device: the steps taken so far, which the update advances
  const void* lr = nullptr;  // on the device
  bool lr_is_double = false;
  double host_lr = 0, t = 1;  // where the device has none

  bool is_on_device() const { return step || lr; }
};

// One rule applied to one parameter.
struct Update {
  int rule;  // its index among the kernels of the CPU
  int scalar_count;
  const Job* job;
  double grad_scale;
  Clock clock;
  int64_t* rounding = nullptr;  // on the device: key and number of the draw of random bits
  bool draws_again = false;     // takes those of an update that has come before
};

// Whether a kernel takes the streams of a job.
bool can_access(const Job& job);

// Memory of the device, of so many bytes, that outlives all launches of a step.
using Allocate = std::function<char*(int64_t bytes)>;

template <class Item>
class Table;

class Queue {
 public:
  Queue(const Kernels& kernels, const Launch& launch, Allocate allocate)
      : kernels_(kernels), launch_(launch), allocate_(std::move(allocate)) {}

  // Joins what the norm adds up over the items; `finish` says what then becomes of it.
  void norm(Norm norm, const std::vector<NormItem>& items, FinishArgs finish) const;
  void finish(const FinishArgs& args) const { kernels_.finish(launch_, args); }

  // Updates all, in any order unless `in_order`.
  void update(const std::vector<Update>& updates, const Decision* decision, bool in_order) const;

  // Keeps what these parameters are, and returns what adds up, once they are updated, what has
  // become of them. (`begin` and `before` of an item are yet to be set.)
  std::function<void()> watch(std::vector<WatchItem> items, const Decision* decision) const;

  template <class T>
  T* allocate(int64_t count) const {
    return reinterpret_cast<T*>(allocate_(count * int64_t{sizeof(T)}));
  }

 private:
  template <class T>
  std::function<void()> make_update(const std::vector<const Update*>& updates, int kind,
                                    const Decision* decision) const;
  template <class Item>
  Args<Item> arguments(const Table<Item>& table, const Decision* decision) const;

  const Kernels& kernels_;
  Launch launch_;
  Allocate allocate_;
};

}  // namespace cuda
}  // namespace fusedopt
