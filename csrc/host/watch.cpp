#include "watch.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace py = pybind11;

namespace fusedlr {

namespace {

// elements, and how much has to be stepped over for each
bool same_extents(const dlpack::Tensor& a, const int64_t* b) {
    for (int32_t i = 0; i < a.ndim; ++i)
        if (a.shape[i] != b[2 * i] || a.strides[i] != b[2 * i + 1]) return false;
    return true;
}

// through the slot of the type itself where it has one, in half the time of a search for it
py::object attribute(PyObject* object, PyObject* name) {
    PyTypeObject* const type = Py_TYPE(object);
    PyObject* const slot = type->tp_dict ? PyDict_GetItemWithError(type->tp_dict, name) : nullptr;
    const bool member = slot && Py_TYPE(slot) == &PyMemberDescr_Type;
    PyObject* const value =
        member ? PyMemberDescr_Type.tp_descr_get(slot, object, reinterpret_cast<PyObject*>(type))
               : PyObject_GetAttr(object, name);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

bool same(const py::object& a, const py::object& b) {
    const int equal = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    return equal;
}

// a number may be of any type that float() takes, as numpy's are
bool is_number(PyObject* rate) {
    return !PyObject_TypeCheck(rate, reinterpret_cast<PyTypeObject*>(torch().tensor));
}

}  // namespace

Watch::Watch(const py::list& groups, const py::dict& state, const py::list& params, const py::tuple& names) {
    if (!torch().exchange) throw std::runtime_error("this torch does not describe tensors by DLPack's C ABI");
    for (const py::handle name : names) {
        PyObject* interned = name.inc_ref().ptr();
        PyUnicode_InternInPlace(&interned);
        names_.push_back(interned);
    }
    std::vector<std::pair<PyObject*, int64_t>> row_of;
    for (const py::handle param : params) {
        row_of.emplace_back(param.ptr(), int64_t(rows_.size()));
        add_row(param.ptr(), py::object(state[param]).ptr());
    }
    std::sort(row_of.begin(), row_of.end());
    const auto find = [&row_of](PyObject* param) {
        const auto found = std::lower_bound(row_of.begin(), row_of.end(), std::make_pair(param, int64_t(0)));
        return found != row_of.end() && found->first == param ? found->second : -1;
    };
    for (const py::handle group : groups) {
        groups_.push_back({group.ptr(), {}, is_number(py::object(group["lr"]).ptr()), 0});
        for (const py::handle param : py::list(group["params"]))
            groups_.back().params.push_back({param.ptr(), find(param.ptr())});
    }
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) state_.emplace_back(key, find(key));
    const auto known = [](const auto& entry) { return entry.second >= 0; };
    if (size_t(std::count_if(state_.begin(), state_.end(), known)) != rows_.size())
        throw std::runtime_error("the state is not keyed by the parameters");
    gradients_.resize(rows_.size());
    rates_.resize(groups_.size());
    current_.resize(rows_.size());
    alive_.reserve(rows_.size() * (2 + names_.size()));
}

void Watch::add_row(PyObject* param, PyObject* entry) {
    const py::object gradient = torch().gradient(param);
    Row row = {meta(param), {}, {}, true};
    // a gradient that comes later is expected to look like its parameter
    row.grad = gradient.is_none() ? row.param : meta(gradient.ptr());
    if (gradient.is_none() && !row.grad.wrapper)
        row.grad.type = reinterpret_cast<PyTypeObject*>(torch().tensor);
    // Torch makes negative views of imaginary parts alone, whose numbers lie two apart. To ask each gradient
    // would give up the interpreter's lock as often: another thread that wants it keeps it for milliseconds
    for (uint32_t i = row.grad.begin; i < row.grad.end; i += 2)
        row.may_be_negated &= extents_[i] < 2 || extents_[i + 1] != 1;
    for (PyObject* const name : names_) {
        PyObject* const value = PyDict_Check(entry) ? PyDict_GetItemWithError(entry, name) : nullptr;
        row.state.push_back(value ? meta(value) : Meta{});
    }
    rows_.push_back(row);
}

Meta Watch::meta(PyObject* tensor) {
    PyTypeObject* const wrapper = torch().is_sharded(tensor) ? Py_TYPE(tensor) : nullptr;
    py::object spec, part;
    if (wrapper) {
        spec = attribute(tensor, torch().spec_name), part = attribute(tensor, torch().local_name);
        tensor = part.ptr();
    }
    const dlpack::Tensor t = torch().describe(tensor);
    Meta seen = {t.data, Py_TYPE(tensor), t.device, t.dtype, 1, uint32_t(extents_.size()), 0};
    seen.wrapper = wrapper, seen.spec = spec;
    for (int32_t i = 0; i < t.ndim; ++i) {
        seen.size *= t.shape[i];
        extents_.push_back(t.shape[i]);
        extents_.push_back(t.strides[i]);
    }
    seen.end = uint32_t(extents_.size());
    return seen;
}

// spread: whether a DTensor has to be spread as before, too
bool Watch::as_before(PyObject* tensor, const Meta& before, bool spread, void** moved_to) const {
    py::object part;
    if (tensor && before.wrapper) {
        if (Py_TYPE(tensor) != before.wrapper) return false;
        // FSDP gives every gradient the same description; others make an equal one
        if (spread && !same(attribute(tensor, torch().spec_name), before.spec)) return false;
        part = attribute(tensor, torch().local_name);
        tensor = part.ptr();
    }
    if (!tensor || Py_TYPE(tensor) != before.type) return false;
    const dlpack::Tensor t = torch().describe(tensor);
    if (moved_to) *moved_to = t.data;
    return (moved_to ? t.data || !before.size : t.data == before.data) &&
           t.device.device_type == before.device.device_type &&
           t.device.device_id == before.device.device_id && t.dtype.code == before.dtype.code &&
           t.dtype.bits == before.dtype.bits && size_t(t.ndim) * 2 == before.end - before.begin &&
           same_extents(t, extents_.data() + before.begin);
}

bool Watch::unchanged(const py::object& groups, const py::object& state) try {
    if (!PyList_Check(groups.ptr()) || !PyDict_Check(state.ptr())) return false;
    if (size_t(PyList_GET_SIZE(groups.ptr())) != groups_.size()) return false;
    written_ = py::list();
    for (size_t i = 0; i < groups_.size(); ++i) {
        PyObject* const group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(i));
        if (group != groups_[i].object || !note_rate(i, group)) return false;
        PyObject* const params = PyDict_GetItemWithError(group, torch().params_name);
        const std::vector<Param>& before = groups_[i].params;
        if (!params || !PyList_Check(params) || size_t(PyList_GET_SIZE(params)) != before.size())
            return false;
        for (size_t j = 0; j < before.size(); ++j) {
            PyObject* const p = PyList_GET_ITEM(params, Py_ssize_t(j));
            if (p != before[j].object || !note_gradient(p, before[j].row)) return false;
        }
        groups_[i].written_end = PyList_GET_SIZE(written_.ptr());
    }
    return same_state(state.ptr());
} catch (py::error_already_set& error) {
    // fusedlr/step.py raises an error that names the tensor; an interrupt is passed on
    if (!error.matches(PyExc_Exception)) throw;
    return false;
}

bool Watch::note_rate(size_t i, PyObject* group) {
    PyObject* const rate = PyDict_GetItemWithError(group, torch().lr_name);
    if (!rate || is_number(rate) != groups_[i].rate_is_number) return false;
    rates_[i] = is_number(rate) ? PyFloat_AsDouble(rate) : std::numeric_limits<double>::quiet_NaN();
    if (rates_[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    return true;
}

bool Watch::note_gradient(PyObject* param, int64_t index) {
    py::object gradient = torch().gradient(param);
    if (index < 0) return gradient.is_none();
    const Row& row = rows_[size_t(index)];
    if (!as_before(param, row.param, true)) return false;
    void* moved_to = nullptr;
    if (!gradient.is_none() && (!as_before(gradient.ptr(), row.grad, true, &moved_to) ||
                                (row.may_be_negated && torch().is_negated(gradient.ptr()))))
        return false;
    // an empty tensor may have no address, and has nothing to step either way but its count
    const uintptr_t address =
        gradient.is_none() ? 0 : std::max(uintptr_t(moved_to), uintptr_t(row.grad.size == 0));
    uintptr_t& before = gradients_[size_t(index)];
    presence_ += (before == 0) != (address == 0);
    before = address;
    current_[size_t(index)] = address ? gradient.ptr() : nullptr;
    if (gradient.is_none()) return true;
    if (PyList_Append(written_.ptr(), param)) throw py::error_already_set();
    alive_.push_back(std::move(gradient));
    return true;
}

bool Watch::same_state(PyObject* state) {
    if (size_t(PyDict_Size(state)) != state_.size()) return false;
    size_t at = 0;
    PyObject *key, *entry;
    for (Py_ssize_t next = 0; PyDict_Next(state, &next, &key, &entry); ++at) {
        if (key != state_[at].first) return false;
        if (state_[at].second < 0) continue;
        if (!PyDict_Check(entry)) return false;
        const Row& row = rows_[size_t(state_[at].second)];
        for (size_t i = 0; i < names_.size(); ++i) {
            if (!row.state[i].type) continue;
            PyObject* const value = PyDict_GetItemWithError(entry, names_[i]);
            if (!as_before(value, row.state[i], false)) return false;
            alive_.push_back(py::reinterpret_borrow<py::object>(value));
        }
    }
    return true;
}

int64_t Watch::version(PyObject* gradient) const {
    PyObject* const value = PyObject_GetAttr(gradient, torch().version_name);
    const int64_t version = value ? PyLong_AsLongLong(value) : -1;
    Py_XDECREF(value);
    if (version == -1 && PyErr_Occurred()) throw py::error_already_set();
    return version;
}

void Watch::remember_gradients() try {
    remembered_.clear();
    std::vector<Remembered> seen;
    for (size_t i = 0; i < rows_.size(); ++i) {
        seen.push_back({{}, gradients_[i], 0});
        if (!current_[i]) continue;
        seen.back().reference = py::reinterpret_steal<py::object>(PyWeakref_NewRef(current_[i], nullptr));
        if (!seen.back().reference) throw py::error_already_set();
        seen.back().version = version(current_[i]);
    }
    remembered_ = std::move(seen);
} catch (py::error_already_set& error) {
    // torch counts no writes to a tensor made in inference mode: nothing is remembered then
    if (!error.matches(PyExc_Exception)) throw;
}

bool Watch::same_gradients() const try {
    if (remembered_.size() != rows_.size()) return false;
    for (size_t i = 0; i < rows_.size(); ++i) {
        const Remembered& before = remembered_[i];
        if (gradients_[i] != before.address) return false;
        if (!current_[i]) continue;
        // a live object has one reference of this kind, so another tensor at its address has another
        const py::object now = py::reinterpret_steal<py::object>(PyWeakref_NewRef(current_[i], nullptr));
        if (!now) throw py::error_already_set();
        if (now.ptr() != before.reference.ptr() || version(current_[i]) != before.version) return false;
    }
    return true;
} catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;
    return false;
}

void Watch::increment_versions(const std::optional<std::vector<bool>>& groups) const {
    py::list written = written_;
    if (groups) {
        if (groups->size() != groups_.size()) throw std::invalid_argument("there is an entry per group");
        written = py::list();
        Py_ssize_t i = 0;
        for (size_t j = 0; j < groups_.size(); ++j)
            for (; i < groups_[j].written_end; ++i)
                if ((*groups)[j]) written.append(py::handle(PyList_GET_ITEM(written_.ptr(), i)));
    }
    PyObject* const result = PyObject_CallOneArg(torch().increment_version, written.ptr());
    if (!result) throw py::error_already_set();
    Py_DECREF(result);
}

void Watch::release() {
    alive_.clear();
    std::fill(current_.begin(), current_.end(), nullptr);
    if (written_) PyList_SetSlice(written_.ptr(), 0, PyList_GET_SIZE(written_.ptr()), nullptr);
}

}  // namespace fusedlr
