// What Python asks of a step, beside its param groups.
#pragma once

#include <optional>

#include "step/watch.h"

namespace fusedopt {

// fusedopt._engine.Scaling, which outlives this.
class AskedScaling {
  Fields fields_;

 public:
  explicit AskedScaling(const py::tuple& source) : fields_(source) {}

  const py::handle unscale = fields_.next<py::handle>();
  const py::handle coefficient = fields_.next<py::handle>();
  const py::handle max_norm = fields_.next<py::handle>();
  const bool skip_nonfinite = fields_.next<bool>();
  const py::handle skip = fields_.next<py::handle>();
  const py::handle spikes = fields_.next<py::handle>();
  const bool says_factor = fields_.next<bool>();

  const std::optional<AskedWatch> watch =
      spikes.is_none() ? std::nullopt : std::make_optional<AskedWatch>(spikes);

  bool clips() const { return !max_norm.is_none(); }
  bool needs_norm() const { return clips() || skip_nonfinite || (watch && !watch->knows_norm()); }
  bool may_skip() const { return skip_nonfinite || !skip.is_none() || (watch && !watch->clips); }
  // Whether it takes Python to know them, or a device.
  bool has_tensors() const {
    return !skip.is_none() || !PyFloat_Check(unscale.ptr()) || !PyFloat_Check(coefficient.ptr()) ||
           (watch && watch->has_tensors());
  }
};

}  // namespace fusedopt
