// Gradients alone: the sum of their squares, and on the CPU changes in place.
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

// Adds the squares of all elements, in the order that core/squares.h defines. Wakes about one thread for
// each `grain_bytes`.
cpu::Squares sum_of_squares(const std::vector<Segment>& gradients, int64_t grain_bytes);

// Gives the Python module functions of lists. Each serves the dense tensors of one device and returns the others.
void define_gradients(pybind11::module_& m);

}  // namespace dracopt
