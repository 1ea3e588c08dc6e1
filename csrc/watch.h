// Whether the tensors of an optimizer are still what they were when they were packed, and where their
// gradients are now: what a step costs the host. Called by fusedlr/plan.py through cpu_module.cpp.
//
// 0.5 us per tensor, 0.22 ms for 448, and with telling autograd 0.34 ms for the whole step but its arithmetic
// (Xeon, idle, 2026-11-22). Every kernel is given addresses, and any tensor may have been moved, replaced or
// given another gradient since the last step (`p.data = x`, zero_grad, a loaded or offloaded state): torch is
// asked for its description of five tensors per parameter, 0.1 us each, and for three attributes. The same
// questions from Python take some fifteen calls per tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack_abi.h"

namespace fusedlr {

// what a tensor is, as torch tells it; ends are indices into the shapes and strides of all of them
struct Meta {
    void* data;
    PyTypeObject* type;
    dlpack::Device device;
    dlpack::DataType dtype;
    int64_t size;  // elements
    uint32_t begin, end;
};

class Watch {
  public:
    // groups: an optimizer's param_groups, dicts; state: its state
    Watch(const pybind11::list& groups, const pybind11::dict& state);

    // whether all is as it was, but for the values and the addresses of gradients, which are noted
    bool same(const pybind11::object& groups, const pybind11::object& state);

    // tells autograd that the step writes to its tensors: a backward through older values then raises
    void increment_versions() const;
    // lets go of the tensors, which are kept alive from same on
    void release();
    // the same, for the caller to let go of
    std::vector<pybind11::object> take_gradients() { return std::move(gradients_alive_); }

    const std::vector<uintptr_t>& gradients() const { return gradients_; }

  private:
    struct Param {
        // never followed unless a list or the state holds the same pointer now
        PyObject* object;
        bool trainable;
        int64_t row;  // -1 without a gradient
    };
    // parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, step
    struct Row {
        Meta of[6];
        // whether its gradient could be a negative view without looking like another tensor
        bool may_be_negated;
        // whether its step shares another row's version counter
        bool shares_step;
    };

    Meta meta(PyObject* tensor);
    bool as_before(PyObject* tensor, const Meta& before, void** moved_to = nullptr) const;
    void add_row(PyObject* param, PyObject* entry, bool amsgrad);
    void write(PyObject* tensor);

    std::vector<std::vector<Param>> params_;
    std::vector<Row> rows_;
    std::vector<std::pair<PyObject*, int64_t>> state_;  // keys in order, and their rows
    std::vector<int64_t> extents_;                      // shapes and strides
    std::vector<uintptr_t> gradients_;
    std::vector<pybind11::object> gradients_alive_;
    pybind11::list written_;  // as long as there are tensors to write, from the start
    Py_ssize_t filled_ = 0;
    pybind11::object counters_;  // of the row that was added last
};

}  // namespace fusedlr
