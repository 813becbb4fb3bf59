// Gradients alone: the sum of their squares, and changes in place, on the CPU.
#pragma once

#include <pybind11/pybind11.h>

#include <deque>
#include <vector>

#include "bindings/tensor.h"
#include "core/layout.h"
#include "core/segment.h"
#include "cpu/kernels.h"

namespace dracopt {

// Describes a gradient as the only stream of a segment, in the order of its own memory.
Segment segment_of_gradient(Tensor gradient, std::deque<Layout>& layouts);

// Adds the squares of all elements, in the order that core/squares.h defines.
cpu::Squares sum_of_squares(const std::vector<Segment>& gradients);

// The functions of the Python module. Each serves the dense tensors on the CPU in a list, and returns the list's other
// tensors.
void define_gradients(pybind11::module_& m);

}  // namespace dracopt
