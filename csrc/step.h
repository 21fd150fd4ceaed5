// What Python calls: steps and norms.
#pragma once

#include <utility>

#include "tensors.h"

namespace fusedopt {

class Engine {
 public:
  // isa: a name from available_kernels(), or empty for the best.
  Engine(const std::string& isa, bool fast_gather);

  // Steps every parameter that has a gradient, and returns (norm, skipped). `groups` are
  // fusedopt._engine.Group, `scaling` is a fusedopt._engine.Scaling, `state` is the optimizer's.
  //   fallback([(group index, parameter), ...], factor) steps parameters without a kernel, with
  //     their gradients times factor;
  //   outside(gradients) returns the sum of squares of gradients that need Python for it.
  // Everything is validated before anything changes. The norm is NaN unless `scaling` needs it.
  std::pair<double, bool> step(const py::dict& state, const py::sequence& groups, int threads,
                               const py::object& scaling, const py::object& fallback,
                               const py::object& outside) const;

  // What the norm of order 1, 2 or infinity adds up over the tensors, and those of them that it
  // needs Python for: they are not in it.
  std::pair<double, py::list> norm(const py::sequence& tensors, double order, int threads) const;

  // Applies one rule to streams [param, grad, *states] on exactly `threads` threads: for tests.
  void update(const std::string& rule, int flags, const std::vector<double>& scalars,
              double grad_scale, const py::sequence& tensors, int threads) const;

  // Applies one rule without flags to each row of streams [param, grad, *states], and returns the
  // rows that it cannot read: they are as before.
  py::list apply(const std::string& rule, const std::vector<double>& scalars,
                 const py::sequence& rows, int threads) const;

  const char* isa() const { return kernels_.isa; }
  bool fast_gather() const { return reader_.fast(); }
  const Kernels& kernels() const { return kernels_; }

 private:
  const Kernels& kernels_;
  TensorReader reader_;
};

}  // namespace fusedopt
