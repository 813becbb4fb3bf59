// Throws errors for input that cannot be right. The errors name the parameter or the group, and say what to do.
#pragma once

#include "bindings/inventory.h"
#include "bindings/python_reader.h"

namespace dracopt {

// Throws for the i-th located parameter, one of whose tensors is wrong.
[[noreturn]] void refuse(const Inventory& inventory, const PythonReader& keys, size_t i);

// Throws for the scalars of the i-th located parameter, which are infinite.
[[noreturn]] void refuse_scalars(const Inventory& inventory, const PythonReader& keys, size_t i);

// Throws if a graph is being captured that could not be replayed correctly. A replay repeats what the device did, but
// not what the host did.
void check_capture(const Inventory& inventory, const PythonReader& keys, const Backends& backends,
                   const std::string& optimizer, bool at_random);

}  // namespace dracopt
