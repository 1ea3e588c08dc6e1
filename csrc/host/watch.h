// Whether the tensors of an optimizer are still what they were when its step was prepared, where their
// gradients are now, and which rates are given: what a step costs the host. Called by fusedlr/step.py through
// module.cpp.
//
// 0.5 us per tensor, 0.22 ms for 448, and with telling autograd 0.34 ms for the whole step but its arithmetic
// (Xeon, idle, 2026-11-22). Every kernel is given addresses, and any tensor may have been moved, replaced or
// given another gradient since the last step (`p.data = x`, zero_grad, a loaded or offloaded state): torch is
// asked for its description of five tensors per parameter, 0.1 us each. The same questions from Python take
// some fifteen calls per tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "torch_access.h"

namespace fusedlr {

// what a tensor is, as torch describes it; begin and end are indices into the extents of all tensors
struct Meta {
    void* data;
    PyTypeObject* type;
    dlpack::Device device;
    dlpack::DataType dtype;
    int64_t size;  // elements
    uint32_t begin, end;
    // of a DTensor, whose local part the rest is about; null for any other tensor
    PyTypeObject* wrapper = nullptr;
    // over which mesh it is spread, and how
    pybind11::object spec = {};
};

class Watch {
  public:
    // groups: an optimizer's param_groups; state: its state; params: the parameters that have a row, in the
    // order of the groups; names: what the state of a parameter may hold
    Watch(const pybind11::list& groups, const pybind11::dict& state, const pybind11::list& params,
          const pybind11::tuple& names);

    // Whether all is as it was, but for values, given rates, and which gradients there are and where: these
    // are noted. The tensors are kept alive from here until release.
    bool unchanged(const pybind11::object& groups, const pybind11::object& state);

    // Until release: keeps in mind which gradients these are and how often they have been written to, and
    // says later whether they are the same tensors at the same addresses and were not written to since. A
    // write that torch does not count, as one through `.data`, is not seen.
    void remember_gradients();
    bool same_gradients() const;

    // tells autograd that the step writes to its parameters, of these groups or of all: a backward through
    // older values then raises
    void increment_versions(const std::optional<std::vector<bool>>& groups) const;
    // lets go of the tensors
    void release();

    // one per row, 0 where there is no gradient
    const std::vector<uintptr_t>& gradients() const { return gradients_; }
    // one per group, nan where the rate is not a number
    const std::vector<double>& rates() const { return rates_; }
    // moves on whenever other rows have a gradient than in the step before
    int64_t presence() const { return presence_; }

  private:
    struct Param {
        // never followed unless a list holds the same pointer now
        PyObject* object;
        int64_t row;  // -1 for a parameter that has no state and had no gradient
    };
    struct Group {
        PyObject* object;  // never followed unless the list of groups holds the same pointer now
        std::vector<Param> params;
        bool rate_is_number;
        Py_ssize_t written_end;  // one past its last parameter in written_
    };
    struct Row {
        Meta param, grad;
        std::vector<Meta> state;  // in the order of the names; the type is null where there is no such tensor
        // whether its gradient could be a negative view without looking like another tensor
        bool may_be_negated;
    };

    // a gradient is held weakly, because it must be free to go with zero_grad
    struct Remembered {
        pybind11::object reference;  // null where there was no gradient
        uintptr_t address;
        int64_t version;
    };

    Meta meta(PyObject* tensor);
    bool as_before(PyObject* tensor, const Meta& before, bool spread, void** moved_to = nullptr) const;
    void add_row(PyObject* param, PyObject* entry);
    bool note_rate(size_t group, PyObject* object);
    bool note_gradient(PyObject* param, int64_t row);
    bool same_state(PyObject* state);
    int64_t version(PyObject* gradient) const;

    std::vector<PyObject*> names_;  // interned, as long as the process lives
    std::vector<Group> groups_;
    std::vector<Row> rows_;
    std::vector<std::pair<PyObject*, int64_t>> state_;  // keys in order, and their rows
    std::vector<int64_t> extents_;                      // shapes and strides
    std::vector<uintptr_t> gradients_;
    std::vector<PyObject*> current_;  // per row the gradient or null, between unchanged and release
    std::vector<Remembered> remembered_;
    std::vector<double> rates_;
    int64_t presence_ = 0;
    std::vector<pybind11::object> alive_;
    pybind11::list written_;
};

}  // namespace fusedlr
