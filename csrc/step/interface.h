// step/: what Python calls, from its objects to jobs and back: all validation, all messages about
// parameters.
#pragma once

#include <deque>
#include <memory>

#include "cpu/dispatch.h"
#include "cuda/tables.h"
#include "torch/tensors.h"

namespace fusedopt {

class AskedScaling;
class DeviceQueue;
class Group;
class KnownGroups;
class StepPlan;
class Watched;
struct Repeat;
struct PlanMemory;

class Engine {
 public:
  // isa: a name from available_kernels(), or empty for the best. device: whose kernels step
  // parameters on CUDA devices: "cuda", "none", or, in a build for tests, a name that
  // tests/emulated_device.h has: then parameters on the CPU are taken to be on a device.
  Engine(const std::string& isa, bool fast_gather, const std::string& device);
  ~Engine();

  // Steps every parameter that has a gradient, and returns (norm, skipped, factor of gradients):
  // numbers, or tensors on a device that nobody has waited for, the factor if it was asked for.
  // `groups` are param groups, `known` is what the last step of this optimizer found of them, and
  // `scaling` is a fusedopt._engine.Scaling.
  //   fallback([(group index, parameter), ...], factor) steps parameters without a kernel, with
  //     their gradients times factor;
  //   outside(gradients) returns the sum of squares of gradients that need Python for it;
  //   watched, None or a fusedopt._found.Part, gets a row of statistics for each parameter
  //     that a kernel has stepped.
  // Everything is validated before anything changes. The norm is NaN unless `scaling` needs it.
  py::tuple step(const py::object& optimizer, KnownGroups* known, const py::sequence& groups,
                 int threads, const py::tuple& scaling, const py::object& fallback,
                 const py::object& outside, const py::object& watched) const;

  // What the norm of order 1, 2 or infinity adds up over the tensors on the CPU; what it adds up
  // over those on each device, as tensors there; and tensors that it needs Python for.
  py::tuple norm(const py::sequence& tensors, double order, int threads) const;

  // Applies one rule to streams [param, grad, *states] on at most `threads` threads: for tests.
  void update(const std::string& rule, int flags, const std::vector<double>& scalars,
              double grad_scale, const py::sequence& tensors, int threads) const;

  // Applies one rule without flags to each row of streams [param, grad, *states] on the CPU, and
  // returns the other rows, and those that it cannot read: they are as before.
  py::list apply(const std::string& rule, const std::vector<double>& scalars,
                 const py::sequence& rows, int threads) const;

  const char* isa() const { return kernels_.isa; }
  bool fast_gather() const { return reader_.fast(); }
  // Whether a profiler may want to know of a step on this thread.
  bool is_observed() const { return !reader_.fast() || reader_.abi().is_observed(); }
  const Kernels& kernels() const { return kernels_; }
  bool emulated() const { return reader_.emulated(); }
  // Why a CUDA device has no kernels here; empty if it has.
  const std::string& why_not(int device) const { return reader_.why_not(device); }

 private:
  // A step that is not one parallel region on the CPU: the verdict comes first, here or on devices,
  // and then all updates have only a factor.
  py::tuple step_in_parts(StepPlan* plan, const py::dict& state, std::deque<Group>* groups,
                          const AskedScaling& asked, int threads, const py::object& fallback,
                          const py::object& outside, const Watched& watched) const;
  // What is left once the factor of the gradients is known, here or there.
  void update_parts(StepPlan* plan, std::deque<DeviceQueue>* queues, int threads, double factor,
                    const Watched& watched) const;
  // Steps what a plan has set aside, which is to find what it has left.
  void step_later(std::vector<Repeat> later, const py::dict& state, std::deque<Group>* groups,
                  bool may_skip, std::deque<DeviceQueue>* queues, int threads, double factor,
                  const Watched& watched) const;

  const Kernels& kernels_;
  const cuda::Kernels* device_kernels_;
  TensorReader reader_;
  const std::unique_ptr<PlanMemory> spare_;  // of plans
};

}  // namespace fusedopt
