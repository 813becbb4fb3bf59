#include <torch/csrc/utils/pybind.h>

#include "bindings/step_plan.h"
#include "cpu/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  dracopt::cpu::kernels();  // a wrong DRACOPT_ISA fails the import, with its reason, not the first step
  m.def("isa", [] { return dracopt::cpu::kernels().isa; });
  py::class_<dracopt::StepPlan>(m, "StepPlan")
      .def(py::init<const std::string&>(), py::arg("rule"))
      .def("step", &dracopt::StepPlan::step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale") = 1.0,
           py::arg("created") = py::none(), py::arg("stepped") = dracopt::StepPlan::Indices())
      .def_property_readonly("updated", &dracopt::StepPlan::updated);
}
