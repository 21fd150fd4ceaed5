#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "chunk.h"
#include "step.h"

namespace py = pybind11;
using fusedopt::Engine;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The engine of fusedopt. Private: its interface may change in any release.";
  py::class_<Engine>(m, "Engine")
      .def(py::init<const std::string&, bool>(), py::arg("isa") = "", py::arg("fast_gather") = true)
      .def("step", &Engine::step, py::arg("state"), py::arg("groups"), py::arg("threads"),
           py::arg("scaling"), py::arg("fallback"), py::arg("outside"))
      .def("norm", &Engine::norm, py::arg("tensors"), py::arg("order"), py::arg("threads"))
      .def("apply", &Engine::apply, py::arg("rule"), py::arg("scalars"), py::arg("rows"),
           py::arg("threads"))
      .def("update", &Engine::update, py::arg("rule"), py::arg("flags"), py::arg("scalars"),
           py::arg("grad_scale"), py::arg("tensors"), py::arg("threads"))
      .def_property_readonly("isa", &Engine::isa)
      .def_property_readonly("vector_bytes",
                             [](const Engine& engine) { return engine.kernels().vector_bytes; })
      .def_property_readonly("fast_gather", &Engine::fast_gather);
  m.def("clip_coefficient", &fusedopt::clip_coefficient, py::arg("norm"), py::arg("max_norm"));
  m.def("isas", [] {
    py::list names;
    for (const auto* kernels : fusedopt::available_kernels()) names.append(kernels->isa);
    return py::tuple(names);
  });
  m.attr("piece_bytes") = fusedopt::kPieceBytes;
  m.attr("compiler") = FUSEDOPT_COMPILER;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
