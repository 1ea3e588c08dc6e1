// The Python module fusedlr._host: the watch over an optimizer's tensors, which the CPU and CUDA steps share.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "watch.h"

namespace py = pybind11;
using fusedlr::Watch;

namespace fusedlr {
extern const char* const sources;
}

PYBIND11_MODULE(_host, module) {
    py::class_<Watch>(module, "Watch")
        .def(py::init<const py::list&, const py::dict&, const py::list&, const py::tuple&>(),
             py::arg("groups"), py::arg("state"), py::arg("params"), py::arg("names"))
        .def("unchanged", &Watch::unchanged)
        .def("remember_gradients", &Watch::remember_gradients)
        .def("same_gradients", &Watch::same_gradients)
        .def("increment_versions", &Watch::increment_versions, py::arg("groups") = py::none())
        .def("release", &Watch::release)
        .def_property_readonly("gradients", &Watch::gradients)
        .def_property_readonly("rates", &Watch::rates)
        .def_property_readonly("presence", &Watch::presence)
        .def_property_readonly("gradients_at",
                               [](const Watch& watch) { return uintptr_t(watch.gradients().data()); })
        .def_property_readonly("rates_at",
                               [](const Watch& watch) { return uintptr_t(watch.rates().data()); });
    module.attr("sources") = fusedlr::sources;
}
