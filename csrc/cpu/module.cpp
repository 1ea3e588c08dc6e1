// The Python module fusedlr._cpu: addresses and numbers in, no tensors. Called by fusedlr/backends/cpu.py
// alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "step.h"

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

Group make_group(std::shared_ptr<const Schedule<double>> schedule, double peak, double b1, double b2,
                 double eps, double weight_decay, bool maximize, size_t scope) {
    return {schedule, peak, b1, b2, eps, weight_decay, maximize, scope};
}

Scope make_scope(std::optional<double> max_grad_norm, bool skip_nonfinite, bool always, bool by_own_norm,
                 double warmup_steps, double z_thresh, double one_alpha, bool skip_spikes) {
    const Guard<double> guard = {warmup_steps, z_thresh, one_alpha};
    return {bool(max_grad_norm), max_grad_norm.value_or(0), skip_nonfinite, always, by_own_norm, guard,
            skip_spikes};
}

const Kernel& kernel_for(const std::string& isa) {
    for (const Kernel* candidate : kernels())
        if (isa == candidate->name) return *candidate;
    throw std::invalid_argument("this machine cannot run " + isa);
}

// counts and used as in reference.Counters
Counters make_counters(uintptr_t counts, uintptr_t used, uintptr_t squares, size_t groups) {
    int64_t* const k = reinterpret_cast<int64_t*>(counts);
    double* const rows = reinterpret_cast<double*>(used);
    Counters counters = {k + k_k * groups,
                         k + k_skipped * groups,
                         k + k_skips_in_row * groups,
                         k + k_nonfinite * groups,
                         k + k_nonfinite_step * groups,
                         rows + k_lr * groups,
                         rows + k_grad_norm * groups,
                         rows + k_coef * groups,
                         rows + k_limit * groups,
                         {},
                         reinterpret_cast<double*>(squares)};
    for (size_t i = 0; i < counters.norms.size(); ++i) counters.norms[i] = rows + (k_seen + i) * groups;
    return counters;
}

// addresses of the tensors of record.Ring, and its lengths; none where nothing is recorded
using RingAddresses = std::optional<std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>>;

Ring make_ring(const RingAddresses& given) {
    if (!given) return {};
    const auto& [steps, ints, used, sums, last, columns] = *given;
    return {reinterpret_cast<int64_t*>(steps),
            reinterpret_cast<int64_t*>(ints),
            reinterpret_cast<double*>(used),
            reinterpret_cast<double*>(sums),
            last,
            columns};
}

// every list but `states` has one entry per tensor; `states` has one such list per name of the state
std::unique_ptr<Stepper> make_stepper(const std::string& isa, const std::vector<size_t>& groups,
                                      const std::vector<int>& params, const std::vector<int>& state_types,
                                      const std::vector<int64_t>& sizes, const Addresses& p,
                                      const std::vector<Addresses>& states, const Addresses& t, size_t count,
                                      uintptr_t counts, uintptr_t used, uintptr_t squares,
                                      const std::vector<int64_t>& places, const std::vector<int64_t>& columns,
                                      const RingAddresses& ring) {
    const size_t n = sizes.size();
    bool even = groups.size() == n && params.size() == n && state_types.size() == n && p.size() == n &&
                t.size() == n && states.size() == kStates && places.size() == n && columns.size() == n;
    for (const Addresses& addresses : states) even = even && addresses.size() == n;
    if (!even) throw std::invalid_argument("every list must have one entry per tensor");
    std::vector<Row> rows;
    for (size_t i = 0; i < n; ++i) {
        if (groups[i] >= count || (i && groups[i] < groups[i - 1]))
            throw std::invalid_argument("tensors must be in the order of their groups");
        rows.push_back({groups[i],
                        Type(params[i]),
                        Type(state_types[i]),
                        sizes[i],
                        p[i],
                        {},
                        t[i],
                        places[i],
                        columns[i]});
        for (size_t j = 0; j < kStates; ++j) rows.back().states[j] = states[j][i];
    }
    return std::make_unique<Stepper>(std::move(rows), count, make_counters(counts, used, squares, count),
                                     make_ring(ring), kernel_for(isa));
}

void assign(Stepper& stepper, std::vector<Group> groups, std::vector<Scope> scopes) {
    if (groups.size() != stepper.groups()) throw std::invalid_argument("the number of groups has changed");
    for (const Group& group : groups)
        if (group.scope >= scopes.size()) throw std::invalid_argument("a group's scope does not exist");
    stepper.assign(std::move(groups), std::move(scopes));
}

template <class T>
py::list listed(const T* begin, size_t n) {
    py::list list(n);
    for (size_t i = 0; i < n; ++i) list[i] = py::cast(begin[i]);
    return list;
}

// per group: k, the steps skipped in a row, and the lr used, or of a group that made no step the lr of its
// next
py::tuple report(const Stepper& stepper) {
    const Counters& counters = stepper.counters();
    const size_t groups = stepper.groups();
    py::list lr = listed(counters.lr, groups);
    for (size_t j = 0; j < groups; ++j)
        if (stepper.scheduled(j) && !stepper.stepped(j)) lr[j] = py::cast(stepper.lr_at(j, counters.k[j]));
    return py::make_tuple(listed(counters.k, groups), listed(counters.skips_in_row, groups), lr);
}

// gradients, rates: where an array of addresses (one per tensor) and one of doubles (one per group) begin.
// Returns the report of an update, None of a norm alone.
py::object run(Stepper& stepper, int stages, uintptr_t gradients, uintptr_t rates,
               std::optional<double> grad_scale, bool found_inf, int threads,
               std::optional<std::vector<bool>> stepped, std::optional<std::vector<bool>> only) {
    for (const auto* flags : {&stepped, &only})
        if (*flags && (*flags)->size() != stepper.scopes())
            throw std::invalid_argument("there is an entry per scope");
    {
        const py::gil_scoped_release release;
        stepper.run(stages, {reinterpret_cast<const uintptr_t*>(gradients),
                             reinterpret_cast<const double*>(rates), grad_scale ? 1 / *grad_scale : 1,
                             found_inf, threads, std::move(stepped).value_or(std::vector<bool>()),
                             std::move(only).value_or(std::vector<bool>())});
    }
    if (stages & kUpdate) return report(stepper);
    return py::none();
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
    py::class_<Group>(module, "Group")
        .def(py::init(&make_group), py::arg("schedule"), py::arg("peak"), py::arg("b1"), py::arg("b2"),
             py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"), py::arg("scope"));
    py::class_<Scope>(module, "Scope")
        .def(py::init(&make_scope), py::arg("max_grad_norm"), py::arg("skip_nonfinite"), py::arg("always"),
             py::arg("by_own_norm"), py::arg("warmup_steps") = 0, py::arg("z_thresh") = 0,
             py::arg("one_alpha") = 0, py::arg("skip_spikes") = false);
    py::class_<Stepper>(module, "Stepper")
        .def(py::init(&make_stepper), py::arg("isa"), py::arg("group_of"), py::arg("params"),
             py::arg("state_types"), py::arg("sizes"), py::arg("p"), py::arg("states"), py::arg("t"),
             py::arg("groups"), py::arg("counts"), py::arg("used"), py::arg("squares"), py::arg("places"),
             py::arg("columns"), py::arg("ring"))
        .def("assign", &assign, py::arg("groups"), py::arg("scopes"))
        .def("run", &run);
    module.attr("NORM") = int(kNorm);
    module.attr("UPDATE") = int(kUpdate);
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
