// The Python module fusedlr._cpu: addresses and numbers in, no tensors. Called by fusedlr/cpu.py alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "cpu.h"
#include "watch.h"

namespace py = pybind11;
using namespace fusedlr;

namespace fusedlr {
extern const char* const sources;
}

namespace {

using Addresses = std::vector<uintptr_t>;

template <class R>
Schedule<R> make_schedule(
    const std::vector<std::tuple<int64_t, int64_t, int64_t, double, double, int64_t, int64_t, double>>&
        phases,
    const std::vector<double>& table) {
    Schedule<R> schedule;
    for (const auto& [begin, end, origin, from, to, shape, whole, shape_param] : phases)
        schedule.phases.push_back({begin, end, origin, R(from), R(to), shape, whole, R(shape_param)});
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

std::unique_ptr<Tensors> make_tensors(const std::vector<int>& params, const std::vector<int>& moments,
                                      const std::vector<int64_t>& sizes, const Addresses& p,
                                      const Addresses& m, const Addresses& v, const Addresses& tops,
                                      const Addresses& steps) {
    if (params.size() != sizes.size() || moments.size() != sizes.size())
        throw std::invalid_argument("one type per tensor is needed");
    for (const Addresses* addresses : {&p, &m, &v, &steps}) check_size(*addresses, sizes.size());
    if (!tops.empty()) check_size(tops, sizes.size());
    return std::make_unique<Tensors>(params, moments, sizes, p, m, v, tops, steps);
}

const Kernel& kernel_for(const std::string& isa) {
    for (const Kernel* candidate : kernels())
        if (isa == candidate->name) return *candidate;
    throw std::invalid_argument("this machine cannot run " + isa);
}

// addresses of reference.Counters' two matrices, (4, groups) and (3, groups)
struct CounterTable {
    int64_t* counts;
    double* used;
    int64_t groups;

    Counters rows() const {
        const int64_t n = groups;
        return {counts, counts + n, counts + 2 * n, used, used + n, used + 2 * n};
    }
};

template <class T>
py::list listed(const T* begin, int64_t n) {
    py::list list(n);
    for (int64_t i = 0; i < n; ++i) list[size_t(i)] = py::cast(begin[i]);
    return list;
}

// gradients: their addresses. Returns per group k, steps skipped in a row and the lr used, or of a group that
// made no step the lr of its next one
py::tuple step(Tensors& tensors, const Addresses& gradients, const Kernel& kernel,
               const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
               const CounterTable& counters, std::optional<double> grad_scale, bool found_inf, bool joint,
               int threads) {
    check_size(gradients, tensors.size());
    int64_t count = 0;
    for (const int64_t n : counts) count += n;
    if (groups.size() != counts.size() || size_t(count) != tensors.size())
        throw std::invalid_argument("the groups' tensors must be those that were packed");
    const Counters rows = counters.rows();
    {
        const py::gil_scoped_release release;
        tensors.step(gradients, kernel, groups, counts, rows,
                     {bool(grad_scale), grad_scale.value_or(1), found_inf}, joint, threads);
    }
    py::list lr = listed(rows.lr, counters.groups);
    for (size_t i = 0; i < groups.size(); ++i) {
        const Group& group = *groups[i];
        if (!joint && counts[i] == 0 && group.schedule)
            lr[size_t(group.index)] = py::cast(group.peak * group.schedule->at(rows.k[group.index]));
    }
    return py::make_tuple(listed(rows.k, counters.groups), listed(rows.skips_in_row, counters.groups), lr);
}

py::tuple step_watched(Tensors& tensors, Watch& watch, const Kernel& kernel,
                       const std::vector<const Group*>& groups, const std::vector<int64_t>& counts,
                       const CounterTable& counters, std::optional<double> grad_scale, bool found_inf,
                       bool joint, int threads) {
    watch.increment_versions();
    // another thread may watch while this one computes
    const std::vector<py::object> alive = watch.take_gradients();
    const Addresses gradients = watch.gradients();
    return step(tensors, gradients, kernel, groups, counts, counters, grad_scale, found_inf, joint, threads);
}

// A step like the last one, from the optimizer's groups and state to their new values in one call: Python's
// own share of a small step is larger than the kernel's, above all where other code ran in between.
class Repeat {
  public:
    // groups are kept alive by the caller: what is held here, Python's collector would not see
    Repeat(const py::list& groups, py::object watch, py::object tensors, const Kernel& kernel,
           const std::vector<const Group*>& steps, std::vector<int64_t> counts, const CounterTable& counters,
           bool joint)
        : watch_(watch),
          tensors_(tensors),
          kernel_(kernel),
          counts_(counts),
          counters_(counters),
          joint_(joint),
          lr_name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("lr"))) {
        for (const py::handle group : groups) groups_.push_back(group.ptr());
        for (const Group* step : steps) steps_.push_back(*step);
        for (const Group& step : steps_) pointers_.push_back(&step);
        if (groups_.size() != steps_.size()) throw std::invalid_argument("one step per group is needed");
    }

    // None where more than gradients and given rates has changed: nothing has been done then
    py::object operator()(const py::object& groups, const py::object& state, int threads) {
        if (!PyList_Check(groups.ptr()) || size_t(PyList_GET_SIZE(groups.ptr())) != groups_.size())
            return py::none();
        for (size_t i = 0; i < groups_.size(); ++i) {
            PyObject* const group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(i));
            if (group != groups_[i]) return py::none();
            if (steps_[i].schedule) continue;
            PyObject* const lr = PyDict_GetItemWithError(group, lr_name_.ptr());
            // a tensor may be anything by now
            if (!lr || !PyFloat_Check(lr)) return py::none();
            steps_[i].lr = PyFloat_AS_DOUBLE(lr);
        }
        Watch& watch = watch_.cast<Watch&>();
        const Release release = {watch};
        if (!watch.same(groups, state)) return py::none();
        const py::tuple told = step_watched(tensors_.cast<Tensors&>(), watch, kernel_, pointers_, counts_,
                                            counters_, std::nullopt, false, joint_, threads);
        show(groups, told[2]);
        return told;
    }

  private:
    struct Release {
        Watch& watch;
        ~Release() { watch.release(); }
    };

    // the rate just used, past the group's own __setitem__: nobody from outside wrote it
    void show(const py::object& groups, const py::list& rates) const {
        for (size_t i = 0; i < steps_.size(); ++i) {
            PyObject* const group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(i));
            if (steps_[i].schedule && PyDict_SetItem(group, lr_name_.ptr(), rates[i].ptr()))
                throw py::error_already_set();
        }
    }

    std::vector<PyObject*> groups_;
    py::object watch_, tensors_;
    const Kernel& kernel_;
    std::vector<Group> steps_;
    std::vector<const Group*> pointers_;
    std::vector<int64_t> counts_;
    CounterTable counters_;
    bool joint_;
    py::object lr_name_;
};

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
    py::class_<Watch>(module, "Watch")
        .def(py::init<const py::list&, const py::dict&>(), py::arg("groups"), py::arg("state"))
        .def("same", &Watch::same)
        .def("increment_versions", &Watch::increment_versions)
        .def("release", &Watch::release)
        .def_property_readonly("gradients", &Watch::gradients)
        .def_property_readonly("gradients_at",
                               [](const Watch& watch) { return uintptr_t(watch.gradients().data()); })
        .def_property_readonly("count", [](const Watch& watch) { return watch.gradients().size(); });
    py::class_<Kernel>(module, "Kernel").def_readonly("name", &Kernel::name);
    py::class_<Tensors>(module, "Tensors")
        .def(py::init(&make_tensors), py::arg("params"), py::arg("moments"), py::arg("sizes"), py::arg("p"),
             py::arg("m"), py::arg("v"), py::arg("tops"), py::arg("steps"))
        .def("step", &step_watched)
        .def("step", &step);
    py::class_<CounterTable>(module, "CounterTable")
        .def(py::init([](uintptr_t counts, uintptr_t used, int64_t groups) {
                 return CounterTable{reinterpret_cast<int64_t*>(counts), reinterpret_cast<double*>(used),
                                     groups};
             }),
             py::arg("counts"), py::arg("used"), py::arg("groups"));
    py::class_<Repeat>(module, "Repeat")
        .def(py::init<const py::list&, py::object, py::object, const Kernel&,
                      const std::vector<const Group*>&, std::vector<int64_t>, const CounterTable&, bool>(),
             py::arg("groups"), py::arg("watch"), py::arg("tensors"), py::arg("kernel"), py::arg("steps"),
             py::arg("counts"), py::arg("counters"), py::arg("joint"))
        .def("__call__", &Repeat::operator());
    module.def("kernel", &kernel_for, py::arg("isa"), py::return_value_policy::reference);
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
