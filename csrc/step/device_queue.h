// What a step does on one CUDA device.
#pragma once

#include "cuda/queue.h"
#include "torch/tensors.h"

namespace fusedopt {

class DeviceQueue {
 public:
  DeviceQueue(const cuda::Kernels& kernels, const TensorReader& reader, int device);

  int device() const { return device_; }
  bool is_capturing() const { return is_capturing_; }

  // What the norm adds up, as a 0-dim float64 tensor.
  py::object sum(Norm norm, const std::vector<cuda::NormItem>& items) const;

  // Decides what all updates after it do: by the 2-norm of the items, joined with what was added up
  // elsewhere, `sum` on the CPU and `sums` on devices. `scaling` is a fusedopt._engine.Scaling.
  void decide(const py::object& scaling, double sum, const py::list& sums,
              const std::vector<cuda::NormItem>& items);
  const py::object& norm_result() const { return norm_result_; }        // 0-dim float32 tensors
  const py::object& skipped_result() const { return skipped_result_; }  // 1 or 0

  void update(const std::vector<cuda::Update>& updates, bool in_order) const {
    queue_.update(updates, decision_, in_order);
  }

 private:
  int device_;
  int place_;          // of its memory: the device, or kHost if it is emulated
  py::object memory_;  // the module fusedopt._memory
  bool is_capturing_;  // into a graph
  std::shared_ptr<Held> held_;
  cuda::Queue queue_;
  cuda::Decision* decision_ = nullptr;
  py::object norm_result_, skipped_result_;
};

}  // namespace fusedopt
