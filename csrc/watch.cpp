// Python's and DLPack's C interfaces directly: this runs before every step, for every tensor.
#include "watch.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace fusedlr {

namespace {

// what of torch is looked up once; lives as long as the process
struct Torch {
    const dlpack::ExchangeAPI* exchange = nullptr;
    PyObject *tensor, *parameter;    // types without overrides
    PyObject *grad, *requires_grad;  // their getters
    PyObject* is_neg;                // unbound method
    PyObject* increment_version;
    PyObject *grad_name, *requires_grad_name, *params_name;
    PyObject* state_names[4];

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        const py::object base = torch.attr("_C").attr("TensorBase");
        const auto keep = [](py::object object) { return object.release().ptr(); };
        tensor = keep(torch.attr("Tensor"));
        parameter = keep(torch.attr("nn").attr("Parameter"));
        grad = keep(base.attr("grad"));
        requires_grad = keep(base.attr("requires_grad"));
        is_neg = keep(base.attr("is_neg"));
        increment_version = keep(torch.attr("autograd").attr("graph").attr("increment_version"));
        grad_name = PyUnicode_InternFromString("grad");
        requires_grad_name = PyUnicode_InternFromString("requires_grad");
        params_name = PyUnicode_InternFromString("params");
        const char* const names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"};
        for (int i = 0; i < 4; ++i) state_names[i] = PyUnicode_InternFromString(names[i]);
        const py::object capsule = py::getattr(py::handle(tensor), "__dlpack_c_exchange_api__", py::none());
        if (capsule.is_none()) return;
        const void* const api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
        if (!api) throw py::error_already_set();
        exchange = static_cast<const dlpack::ExchangeAPI*>(api);
        while (exchange && exchange->major != 1) exchange = exchange->older;
        if (exchange && !exchange->tensor_from_object) exchange = nullptr;
    }

    // tensor.name; subclasses may override it
    py::object get(PyObject* object, PyObject* descriptor, PyObject* name) const {
        PyObject* value;
        PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
        if ((type == tensor || type == parameter) && Py_TYPE(descriptor) == &PyGetSetDescr_Type) {
            const PyGetSetDef* const def = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
            value = def->get(object, def->closure);
        } else {
            value = PyObject_GetAttr(object, name);
        }
        if (!value) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(value);
    }

    bool is_trainable(PyObject* param) const {
        return get(param, requires_grad, requires_grad_name).ptr() == Py_True;
    }

    py::object gradient(PyObject* param) const { return get(param, grad, grad_name); }

    bool is_negated(PyObject* object) const {
        const PyMethodDef* const def = reinterpret_cast<PyMethodDescrObject*>(is_neg)->d_method;
        const bool direct = Py_TYPE(is_neg) == &PyMethodDescr_Type && def->ml_flags == METH_NOARGS;
        PyObject* const value = direct ? def->ml_meth(object, nullptr) : PyObject_CallOneArg(is_neg, object);
        if (!value) throw py::error_already_set();
        Py_DECREF(value);
        return value == Py_True;
    }
};

const Torch& torch() {
    // never destroyed: Python may be gone before static destructors run
    static const Torch* const found = new Torch();
    return *found;
}

dlpack::Tensor describe(PyObject* tensor) {
    dlpack::Tensor described;
    if (torch().exchange->tensor_from_object(tensor, &described)) throw py::error_already_set();
    described.data = static_cast<char*>(described.data) + described.byte_offset;
    return described;
}

// elements, and how much has to be stepped over for each
bool same_extents(const dlpack::Tensor& a, const int64_t* b) {
    for (int32_t i = 0; i < a.ndim; ++i)
        if (a.shape[i] != b[2 * i] || a.strides[i] != b[2 * i + 1]) return false;
    return true;
}

PyObject* item(PyObject* entry, int i) {
    return PyDict_Check(entry) ? PyDict_GetItemWithError(entry, torch().state_names[i]) : nullptr;
}

}  // namespace

Watch::Watch(const py::list& groups, const py::dict& state) {
    if (!torch().exchange) throw std::runtime_error("this torch does not describe tensors by DLPack's C ABI");
    std::vector<std::pair<PyObject*, int64_t>> row_of;
    for (const py::handle group : groups) {
        const bool amsgrad = py::bool_(py::object(group["amsgrad"]));
        params_.emplace_back();
        for (const py::handle param : py::list(group["params"])) {
            PyObject* const p = param.ptr();
            Param seen = {p, torch().is_trainable(p), -1};
            if (seen.trainable && !torch().gradient(p).is_none()) {
                seen.row = int64_t(rows_.size());
                add_row(p, py::object(state[param]).ptr(), amsgrad);
                row_of.emplace_back(p, seen.row);
            }
            params_.back().push_back(seen);
        }
    }
    std::sort(row_of.begin(), row_of.end());
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value);) {
        const auto found = std::lower_bound(row_of.begin(), row_of.end(), std::make_pair(key, int64_t(0)));
        const bool has_row = found != row_of.end() && found->first == key;
        state_.emplace_back(key, has_row ? found->second : -1);
    }
    const auto known = [](const auto& entry) { return entry.second >= 0; };
    if (size_t(std::count_if(state_.begin(), state_.end(), known)) != rows_.size())
        throw std::runtime_error("the state is not keyed by the parameters");
    gradients_.resize(rows_.size());
    size_t written = 0;
    for (const Row& row : rows_)
        for (int i = 0; i < 6; ++i) written += i != 1 && row.of[i].type && !(i == 5 && row.shares_step);
    counters_ = py::object();
    written_ = py::list(written);
    for (size_t i = 0; i < written; ++i) written_[i] = py::none();
}

void Watch::add_row(PyObject* param, PyObject* entry, bool amsgrad) {
    const py::object gradient = torch().gradient(param);
    Row row = {{meta(param), meta(gradient.ptr())}, true, false};
    // Torch makes negative views of imaginary parts alone, whose numbers lie two apart. To ask each gradient
    // would give up the interpreter's lock as often: another thread that wants it keeps it for milliseconds
    const Meta& g = row.of[1];
    for (uint32_t i = g.begin; i < g.end; i += 2)
        row.may_be_negated &= extents_[i] < 2 || extents_[i + 1] != 1;
    for (int i = 0; i < 4; ++i) {
        if (i == 2 && !amsgrad) continue;
        PyObject* const value = item(entry, i);
        if (!value) throw std::runtime_error("a parameter has no state");
        row.of[2 + i] = meta(value);
        if (i < 3) continue;
        // views of one tensor, as fusedlr/plan.py makes them
        py::object counters = py::getattr(py::handle(value), "_base");
        row.shares_step = !counters.is_none() && counters.is(counters_);
        counters_ = std::move(counters);
    }
    rows_.push_back(row);
}

Meta Watch::meta(PyObject* tensor) {
    // its memory holds the opposite numbers
    if (torch().is_negated(tensor)) throw std::runtime_error("a tensor is a negative view");
    const dlpack::Tensor t = describe(tensor);
    Meta seen = {t.data, Py_TYPE(tensor), t.device, t.dtype, 1, uint32_t(extents_.size()), 0};
    for (int32_t i = 0; i < t.ndim; ++i) {
        seen.size *= t.shape[i];
        extents_.push_back(t.shape[i]);
        extents_.push_back(t.strides[i]);
    }
    seen.end = uint32_t(extents_.size());
    if (seen.size && !t.data) throw std::runtime_error("a tensor has no memory of its own");
    return seen;
}

bool Watch::as_before(PyObject* tensor, const Meta& before, void** moved_to) const {
    if (!tensor || Py_TYPE(tensor) != before.type) return false;
    const dlpack::Tensor t = describe(tensor);
    if (moved_to) *moved_to = t.data;
    return (moved_to ? t.data || !before.size : t.data == before.data) &&
           t.device.device_type == before.device.device_type &&
           t.device.device_id == before.device.device_id && t.dtype.code == before.dtype.code &&
           t.dtype.bits == before.dtype.bits && size_t(t.ndim) * 2 == before.end - before.begin &&
           same_extents(t, extents_.data() + before.begin);
}

bool Watch::same(const py::object& param_groups, const py::object& its_state) try {
    release();
    if (!PyList_Check(param_groups.ptr()) || !PyDict_Check(its_state.ptr())) return false;
    const auto groups = py::reinterpret_borrow<py::list>(param_groups);
    const auto state = py::reinterpret_borrow<py::dict>(its_state);
    if (groups.size() != params_.size() || state.size() != state_.size()) return false;
    for (size_t i = 0; i < params_.size(); ++i) {
        PyObject* const group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(i));
        if (!PyDict_Check(group)) return false;
        PyObject* const params = PyDict_GetItemWithError(group, torch().params_name);
        if (!params || !PyList_Check(params) || size_t(PyList_GET_SIZE(params)) != params_[i].size())
            return false;
        for (size_t j = 0; j < params_[i].size(); ++j) {
            const Param& param = params_[i][j];
            PyObject* const p = PyList_GET_ITEM(params, Py_ssize_t(j));
            if (p != param.object || torch().is_trainable(p) != param.trainable) return false;
            if (!param.trainable) continue;
            py::object gradient = torch().gradient(p);
            if (gradient.is_none() != (param.row < 0)) return false;
            if (gradient.is_none()) continue;
            const Row& row = rows_[size_t(param.row)];
            PyObject* const g = gradient.ptr();
            void* moved_to;
            if (!as_before(p, row.of[0]) || !as_before(g, row.of[1], &moved_to) ||
                (row.may_be_negated && torch().is_negated(g)))
                return false;
            gradients_[size_t(param.row)] = uintptr_t(moved_to);
            gradients_alive_.push_back(std::move(gradient));
            write(p);
        }
    }
    size_t at = 0;
    PyObject *key, *entry;
    for (Py_ssize_t next = 0; PyDict_Next(state.ptr(), &next, &key, &entry); ++at) {
        if (key != state_[at].first) return false;
        if (state_[at].second < 0) continue;
        const Row& row = rows_[size_t(state_[at].second)];
        for (int i = 0; i < 4; ++i) {
            if (!row.of[2 + i].type) continue;
            PyObject* const value = item(entry, i);
            if (!as_before(value, row.of[2 + i])) return false;
            if (i < 3 || !row.shares_step) write(value);
        }
    }
    return true;
} catch (py::error_already_set& error) {
    // whoever packs anew says what is wrong; an interrupt is not for them
    if (!error.matches(PyExc_Exception)) throw;
    return false;
}

void Watch::write(PyObject* tensor) {
    Py_INCREF(tensor);
    PyList_SetItem(written_.ptr(), filled_++, tensor);
}

void Watch::increment_versions() const {
    PyObject* const result = PyObject_CallOneArg(torch().increment_version, written_.ptr());
    if (!result) throw py::error_already_set();
    Py_DECREF(result);
}

void Watch::release() {
    while (filled_ > 0) {
        Py_INCREF(Py_None);
        PyList_SetItem(written_.ptr(), --filled_, Py_None);
    }
    gradients_alive_.clear();
}

}  // namespace fusedlr
