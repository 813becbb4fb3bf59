// Tells Python what it must do before a step, or in place of the kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/inventory.h"

namespace dracopt {

// Returns (missing, unsupported, host_decides, nothing_left): runs of parameters whose state must be created;
// parameters that the kernels do not serve, each with the reason and its form, as dracopt_ext/todo.py has it;
// `host_decides`; and whether the kernels serve no parameter at all.
pybind11::tuple make_todo(const Inventory& inventory, bool adjusts, bool host_decides);

}  // namespace dracopt
