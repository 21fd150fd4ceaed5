// What Python hands to a step that looks for spikes, and the norms that limit the next one.
#pragma once

#include "engine/verdict.h"
#include "step/fields.h"
#include "torch/tensors.h"

namespace fusedopt {

py::handle device_memory();  // the module fusedopt._memory

// fusedopt._spikes.Watch, which outlives this.
class AskedWatch {
  Fields fields_;

 public:
  explicit AskedWatch(py::handle source) : fields_(source) {}

  const py::handle norms = fields_.next<py::handle>();
  const uintptr_t address = fields_.next<uintptr_t>();  // of those on the CPU; or 0
  const int64_t size = fields_.next<int64_t>();
  const double warmup = fields_.next<double>();
  const double patience = fields_.next<double>();
  const double sigmas = fields_.next<double>();
  const double threshold = fields_.next<double>();
  const bool clips = fields_.next<bool>();
  const py::handle norm = fields_.next<py::handle>();

  bool knows_norm() const { return !norm.is_none(); }
  // Whether it takes Python to know them, or a device.
  bool has_tensors() const { return !address || !(norm.is_none() || PyFloat_Check(norm.ptr())); }
  Spikes by(double* there) const {
    return {there, size, warmup, patience, sigmas, threshold, clips};
  }
};

// The norms at the place where somebody decides by them: where the optimizer has them, or a copy,
// which is to be put back.
class Window {
 public:
  Window() = default;
  // place: a device, or kHost.
  Window(const AskedWatch& watch, int place)
      : kept_(py::reinterpret_borrow<py::object>(watch.norms)), here_(kept_) {
    uintptr_t address = place == kHost ? watch.address : 0;
    if (!address) {
      here_ = device_memory().attr("moved")(kept_, place);
      address = py::cast<uintptr_t>(here_.attr("data_ptr")());
    }
    data_ = reinterpret_cast<double*>(address);
  }

  bool is_copy() const { return !here_.is(kept_); }
  const py::object& tensor() const { return here_; }
  double* data() const { return data_; }
  void put_back() const {
    if (is_copy()) kept_.attr("copy_")(here_);
  }

 private:
  py::object kept_, here_;
  double* data_ = nullptr;
};

}  // namespace fusedopt
