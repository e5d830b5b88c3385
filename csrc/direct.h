// The ordinary call of a layer, directly from Python's tensors; see direct.cpp.
#pragma once
#include <pybind11/pybind11.h>

// Adds the functions `attach` and `direct` to the module.
void add_direct(pybind11::module_& module);
