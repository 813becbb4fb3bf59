// Examines a parameter's tensors: whether everything is right, and whether the kernels can update them.
#pragma once

#include "bindings/inventory.h"

namespace dracopt {

// Reasons that are given for more than one parameter at a time. Every reason lives as long as the process.
inline constexpr char kUnderMode[] = "steps under a TorchDispatchMode";
inline constexpr char kSharesMemory[] = "tensors that share memory";
inline constexpr char kSubclasses[] = "tensor subclasses";

// Says what the i-th located parameter is. If it is ready, or only its state is missing, fills the segment, except for
// layout, update and unit numbers. Calls no Python and writes nothing else, so threads may share an inventory.
//
// `inference_mode` says whether the thread that steps is in this mode.
Examined examine(const Inventory& inventory, const Backends& backends, size_t i, bool inference_mode, Segment& segment);

// Says whether a parameter that an earlier step found ready is as that step found it. Then examine() would find the
// same again, which takes four times as long. The parameter's group must have the same terms, and its local tensor must
// be of no subclass. Only the gradient may lie elsewhere.
bool is_as_before(Located& located, const Ready& ready, const Segment& segment, int scalars, bool inference_mode,
                  AsBefore& found);

// Numbers a parameter's elements if those of some stream do not simply lie one after the other.
Layout layout_of(const Inventory& inventory, size_t i);

}  // namespace dracopt
