// How torch is asked about tensors without its headers: Python's and DLPack's C interfaces directly, because
// the watch asks before every step, for every tensor.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack_abi.h"

namespace fusedlr {

// what of torch is looked up once; lives as long as the process
struct Torch {
    const dlpack::ExchangeAPI* exchange = nullptr;
    PyObject *tensor, *parameter;  // types without overrides
    PyObject* grad;                // its getter
    PyObject* is_neg;              // unbound method
    PyObject* increment_version;
    PyObject *grad_name, *params_name, *lr_name, *version_name, *local_name, *spec_name;

    Torch();

    // the parameter's gradient or None; subclasses may override the attribute
    pybind11::object gradient(PyObject* param) const;
    // whether the tensor's memory holds the opposite numbers
    bool is_negated(PyObject* tensor) const;
    // whether it is a DTensor, which describes no memory itself
    bool is_sharded(PyObject* tensor) const;
    // what the tensor is; its address is that of the first element
    dlpack::Tensor describe(PyObject* tensor) const;
};

const Torch& torch();

}  // namespace fusedlr
