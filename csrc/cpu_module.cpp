// The Python module fusedlr._cpu: addresses and numbers in, no tensors. Called by fusedlr/cpu.py alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>

#include "cpu.h"

namespace py = pybind11;
using namespace fusedlr;

namespace fusedlr {
extern const char* const sources;
}

namespace {

using Addresses = std::vector<uintptr_t>;

template <class R>
Schedule<R> make_schedule(
    const std::vector<std::tuple<int64_t, int64_t, int64_t, double, double, int64_t, double>>& phases,
    const std::vector<double>& table) {
    Schedule<R> schedule;
    for (const auto& [begin, end, origin, from, to, shape, shape_param] : phases)
        schedule.phases.push_back({begin, end, origin, R(from), R(to), shape, R(shape_param)});
    schedule.table.assign(table.begin(), table.end());
    return schedule;
}

template <class R>
std::vector<double> rates(const Schedule<R>& schedule, const std::vector<int64_t>& ks, double peak) {
    std::vector<double> rates;
    for (const int64_t k : ks) rates.push_back(double(R(peak) * schedule.at(k)));
    return rates;
}

Group make_group(int64_t index, std::shared_ptr<const Schedule<double>> schedule, double lr, double peak,
                 double b1, double b2, double eps, double weight_decay, bool maximize,
                 std::optional<double> max_grad_norm, bool skip_nonfinite, bool advance) {
    return {index,
            schedule,
            lr,
            peak,
            b1,
            b2,
            eps,
            weight_decay,
            maximize,
            bool(max_grad_norm),
            max_grad_norm.value_or(0),
            skip_nonfinite,
            advance};
}

void check_size(const Addresses& addresses, size_t size) {
    if (addresses.size() != size) throw std::invalid_argument("one address per tensor is needed");
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void step(Tensors& tensors, const std::string& isa, const Addresses& p, const Addresses& g,
          const Addresses& m, const Addresses& v, const Addresses& tops, const Addresses& steps,
          const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
          const std::array<uintptr_t, 6>& counters, std::optional<double> grad_scale, bool found_inf,
          bool joint, int threads) {
    for (const Addresses* addresses : {&p, &g, &m, &v, &steps}) check_size(*addresses, tensors.size());
    if (!tops.empty()) check_size(tops, tensors.size());
    int64_t count = 0;
    for (const int64_t n : counts) count += n;
    if (groups.size() != counts.size() || size_t(count) != tensors.size())
        throw std::invalid_argument("the groups' tensors must be those that were packed");
    const Kernel* kernel = nullptr;
    for (const Kernel* candidate : kernels())
        if (isa == candidate->name) kernel = candidate;
    if (!kernel) throw std::invalid_argument("this machine cannot run " + isa);

    const py::gil_scoped_release release;
    tensors.place(p, g, m, v, tops, steps);
    const auto [k, skipped, skips_in_row, lr, grad_norm, coef] = counters;
    tensors.step(*kernel, groups, counts,
                 {at<int64_t>(k), at<int64_t>(skipped), at<int64_t>(skips_in_row), at<double>(lr),
                  at<double>(grad_norm), at<double>(coef)},
                 {bool(grad_scale), grad_scale.value_or(1), found_inf}, joint, threads);
}

template <class R>
void define_schedule(py::module_& module, const char* name) {
    using S = Schedule<R>;
    py::class_<S, std::shared_ptr<S>>(module, name)
        .def(py::init(&make_schedule<R>), py::arg("phases"), py::arg("table"))
        .def("rates", &rates<R>, py::arg("ks"), py::arg("peak"));
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    define_schedule<double>(module, "Schedule");
    define_schedule<float>(module, "Schedule32");
    py::class_<Group>(module, "Group").def(py::init(&make_group));
    py::class_<Tensors>(module, "Tensors")
        .def(py::init<const std::vector<int>&, const std::vector<int>&, const std::vector<int64_t>&>(),
             py::arg("params"), py::arg("moments"), py::arg("sizes"))
        .def("step", &step);
    module.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernel* kernel : kernels()) names.push_back(kernel->name);
        return names;
    });
    module.attr("sources") = sources;
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
}
