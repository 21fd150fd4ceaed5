// The Python module: names for what Python calls, and nothing else.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kernel.h"
#include "engine/ahead.h"
#include "engine/probe.h"
#include "engine/schedule.h"
#include "step/interface.h"
#include "step/known_groups.h"
#if defined(FUSEDOPT_EMULATED_DEVICE)
#include "emulated_device.h"
#endif

namespace py = pybind11;
using fusedopt::Engine;

PYBIND11_MODULE(_core, m) {
  m.doc() = "The engine of fusedopt. Private: its interface may change in any release.";
  py::class_<fusedopt::KnownGroups>(m, "KnownGroups").def(py::init<>());
  py::class_<Engine>(m, "Engine")
      .def(py::init<const std::string&, bool, const std::string&>(), py::arg("isa") = "",
           py::arg("fast_gather") = true, py::arg("device") = "cuda")
      .def("step", &Engine::step, py::arg("optimizer"), py::arg("known"), py::arg("groups"),
           py::arg("threads"), py::arg("scaling"), py::arg("fallback"), py::arg("outside"),
           py::arg("watched") = py::none())
      .def("norm", &Engine::norm, py::arg("tensors"), py::arg("order"), py::arg("threads"))
      .def("apply", &Engine::apply, py::arg("rule"), py::arg("scalars"), py::arg("rows"),
           py::arg("threads"))
      .def("update", &Engine::update, py::arg("rule"), py::arg("flags"), py::arg("scalars"),
           py::arg("grad_scale"), py::arg("tensors"), py::arg("threads"))
      .def_property_readonly("isa", &Engine::isa)
      .def_property_readonly("vector_bytes",
                             [](const Engine& engine) { return engine.kernels().vector_bytes; })
      .def_property_readonly("fast_gather", &Engine::fast_gather)
      .def("is_observed", &Engine::is_observed)
      .def_property_readonly("emulated", &Engine::emulated)
      .def("why_not", &Engine::why_not, py::arg("device"));
  m.def("clip_coefficient", &fusedopt::clip_coefficient, py::arg("norm"), py::arg("max_norm"));
  m.def("move_streams", &fusedopt::move_streams, py::arg("arrays"), py::arg("n"),
        py::arg("reads_first"), py::arg("ahead"), py::arg("temporal"), py::arg("threads"));
  m.attr("probed_ahead") =
      std::vector<int>(std::begin(fusedopt::kProbedAhead), std::end(fusedopt::kProbedAhead));
  m.attr("probed_line") = fusedopt::kProbedLine;
  m.def("isas", [] {
    py::list names;
    for (const auto* kernels : fusedopt::available_kernels()) names.append(kernels->isa);
    return py::tuple(names);
  });
  m.attr("cuda_archs") = FUSEDOPT_CUDA_ARCHS;
  m.def("cuda_driver_version", &fusedopt::cuda::driver_version);
  m.def("cuda_devices", &fusedopt::cuda::device_names);
#if defined(FUSEDOPT_EMULATED_DEVICE)
  m.attr("emulated_device") = true;
  m.def("elements_of_tile", &fusedopt::cuda::elements_of_tile);
  m.def("item_of_unit", &fusedopt::cuda::item_of_unit);
#else
  m.attr("emulated_device") = false;
#endif
  // In two long arrays, and in more of them.
  m.attr("ahead") = py::make_tuple(fusedopt::bytes_ahead(2, fusedopt::kLongArray),
                                   fusedopt::bytes_ahead(3, fusedopt::kLongArray));
  m.attr("tile") = fusedopt::cuda::kTile;
  m.attr("piece_bytes") = fusedopt::kPieceBytes;
  m.attr("compiler") = FUSEDOPT_COMPILER;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
}
