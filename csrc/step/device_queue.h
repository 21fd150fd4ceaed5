// What a step does on one CUDA device: first all memory and all tables of launches, which may fail,
// and then the launches.
#pragma once

#include <deque>
#include <functional>

#include "cuda/queue.h"
#include "step/asked.h"
#include "torch/tensors.h"

namespace fusedopt {

class DeviceQueue {
 public:
  // usual_bytes: what a step takes of the device's memory; the next one is to know.
  DeviceQueue(const cuda::Kernels& kernels, const TensorReader& reader, int device,
              int64_t* usual_bytes);
  ~DeviceQueue();
  DeviceQueue(const DeviceQueue&) = delete;
  DeviceQueue& operator=(const DeviceQueue&) = delete;

  int device() const { return device_; }
  int place() const { return place_; }  // of its memory: the device, or kHost if it is emulated
  bool is_capturing() const { return is_capturing_; }

  // What the norm adds up, as a 0-dim float64 tensor; this is launched at once.
  py::object sum(Norm norm, const std::vector<cuda::NormItem>& items);

  // Decides what all updates after it do: by the 2-norm of the items, joined with what was added up
  // elsewhere, `sum` on the CPU and `sums` on devices, and by the window here, if one was asked
  // for.
  void decide(const AskedScaling& scaling, double sum, const py::list& sums,
              const std::vector<cuda::NormItem>& items, const Window& window);
  const py::object& norm_result() const { return norm_result_; }        // 0-dim float32 tensors,
  const py::object& skipped_result() const { return skipped_result_; }  // 1 or 0; as was asked;
  const py::object& factor_result() const { return factor_result_; }    // and a float64 one

  void update(const std::vector<cuda::Update>& updates, bool in_order) const {
    queue_.update(updates, decision_, in_order);
  }

  // Makes all launches so far, without the GIL: while the device has many to do yet, one waits.
  void launch();

 private:
  struct Launches {
    const cuda::Kernels& kernels;
    const cuda::Launch at;
    std::vector<std::function<void()>> waiting;
  };
  template <class Make>
  static void later(const cuda::Launch& at, Make make);
  // The kernels, but that launches wait: `stream` of a cuda::Launch is then where they do.
  static cuda::Kernels recording(const cuda::Kernels& kernels);

  char* allocate(int64_t bytes);
  char* keep(const py::object& tensor);

  const int device_;
  const int place_;
  const bool is_capturing_;  // into a graph
  Held held_;
  int64_t* const usual_bytes_;
  int64_t bytes_ = 0, left_ = 0;  // what was taken so far; what is left
  char* free_ = nullptr;          // of the memory here
  Launches launches_;
  const cuda::Kernels recording_;
  const cuda::Queue queue_;
  cuda::Decision* decision_ = nullptr;
  py::object norm_result_, skipped_result_, factor_result_;
};

using DeviceQueues = std::deque<DeviceQueue>;

}  // namespace fusedopt
