#include "torch_access.h"

#include <cstring>

namespace py = pybind11;

namespace fusedlr {

Torch::Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object base = torch.attr("_C").attr("TensorBase");
    const auto keep = [](py::object object) { return object.release().ptr(); };
    tensor = keep(torch.attr("Tensor"));
    parameter = keep(torch.attr("nn").attr("Parameter"));
    grad = keep(base.attr("grad"));
    is_neg = keep(base.attr("is_neg"));
    increment_version = keep(torch.attr("autograd").attr("graph").attr("increment_version"));
    grad_name = PyUnicode_InternFromString("grad");
    params_name = PyUnicode_InternFromString("params");
    lr_name = PyUnicode_InternFromString("lr");
    version_name = PyUnicode_InternFromString("_version");
    local_name = PyUnicode_InternFromString("_local_tensor");
    spec_name = PyUnicode_InternFromString("_spec");
    const py::object capsule = py::getattr(py::handle(tensor), "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) return;
    const void* const api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!api) throw py::error_already_set();
    exchange = static_cast<const dlpack::ExchangeAPI*>(api);
    while (exchange && exchange->major != 1) exchange = exchange->older;
    if (exchange && !exchange->tensor_from_object) exchange = nullptr;
}

py::object Torch::gradient(PyObject* param) const {
    PyObject* value;
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(param));
    if ((type == tensor || type == parameter) && Py_TYPE(grad) == &PyGetSetDescr_Type) {
        const PyGetSetDef* const def = reinterpret_cast<PyGetSetDescrObject*>(grad)->d_getset;
        value = def->get(param, def->closure);
    } else {
        value = PyObject_GetAttr(param, grad_name);
    }
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

bool Torch::is_sharded(PyObject* object) const {
    // by name: its module is slow to import
    return !std::strcmp(Py_TYPE(object)->tp_name, "DTensor");
}

bool Torch::is_negated(PyObject* object) const {
    const PyMethodDef* const def = reinterpret_cast<PyMethodDescrObject*>(is_neg)->d_method;
    const bool direct = Py_TYPE(is_neg) == &PyMethodDescr_Type && def->ml_flags == METH_NOARGS;
    PyObject* const value = direct ? def->ml_meth(object, nullptr) : PyObject_CallOneArg(is_neg, object);
    if (!value) throw py::error_already_set();
    Py_DECREF(value);
    return value == Py_True;
}

dlpack::Tensor Torch::describe(PyObject* object) const {
    dlpack::Tensor described;
    if (exchange->tensor_from_object(object, &described)) throw py::error_already_set();
    described.data = static_cast<char*>(described.data) + described.byte_offset;
    return described;
}

const Torch& torch() {
    // never destroyed: Python may be gone before static destructors run
    static const Torch* const found = new Torch();
    return *found;
}

}  // namespace fusedlr
