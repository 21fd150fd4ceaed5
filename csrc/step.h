// One optimizer step, from Python objects to jobs and back: all gathering, all validation, all
// messages.
#pragma once

#include "tensors.h"

namespace fusedopt {

class Engine {
 public:
  // isa: a name from available_kernels(), or empty for the best.
  Engine(const std::string& isa, bool fast_gather);

  // Steps every parameter that has a gradient. `groups` are fusedopt._base.Group; `state` is the
  // optimizer's. Parameters without a kernel go to fallback([(group index, parameter), ...]).
  // Everything is validated before anything changes.
  void step(const py::dict& state, const py::sequence& groups, int threads,
            const py::object& fallback) const;

  // Applies one rule to streams [param, grad, *states] on exactly `threads` threads: for tests.
  void update(const std::string& rule, int flags, const std::vector<double>& scalars,
              double grad_scale, const py::sequence& tensors, int threads) const;

  const char* isa() const { return kernels_.isa; }
  bool fast_gather() const { return reader_.fast(); }
  const Kernels& kernels() const { return kernels_; }

 private:
  const Kernels& kernels_;
  TensorReader reader_;
};

}  // namespace fusedopt
