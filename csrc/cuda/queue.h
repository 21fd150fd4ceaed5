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
};

// How the streams of a job are accessed; false if no kernel does.
bool can_access(const Job& job, Streams* kind);

// Memory of the device that outlives all launches of a step.
struct Memory {
  std::function<char*(int64_t bytes)> allocate;
  // A copy of the host's bytes, made on the same stream; null where a graph is captured.
  std::function<char*(const std::string&)> upload;
};

template <class Item>
struct Table;

class Queue {
 public:
  Queue(const Kernels& kernels, const Launch& launch, Memory memory)
      : kernels_(kernels), launch_(launch), memory_(std::move(memory)) {}

  // Joins what the norm adds up over the items; `finish` says what then becomes of it.
  void norm(Norm norm, const std::vector<NormItem>& items, FinishArgs finish) const;
  void finish(const FinishArgs& args) const { kernels_.finish(launch_, args); }

  // Updates all, in any order unless `in_order`.
  void update(const std::vector<Update>& updates, const Decision* decision, bool in_order) const;

  template <class T>
  T* allocate(int64_t count) const {
    return reinterpret_cast<T*>(memory_.allocate(count * int64_t{sizeof(T)}));
  }

 private:
  template <class T>
  void update_alike(const std::vector<const Update*>& updates, Streams streams,
                    const Decision* decision) const;
  template <class Item, class Start>
  void start(const Table<Item>& table, const void* head, void* results, const Decision* decision,
             Start start) const;
  template <class Item>
  int64_t most_bytes() const;

  const Kernels& kernels_;
  Launch launch_;
  Memory memory_;
};

}  // namespace cuda
}  // namespace fusedopt
