#include <torch/csrc/utils/pybind.h>

#include "bindings/step_plan.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using Indices = dracopt::StepPlan::Indices;
  using Runs = dracopt::StepPlan::Runs;
  if (dracopt::cpu::interface() != DRACOPT_INTERFACE) {
    throw py::import_error("libdracopt_kernels.so is of another build than its binding. Build both again");
  }
  dracopt::cpu::kernels();  // a wrong DRACOPT_ISA fails the import, with its reason, not the first step
  m.def("isa", [] { return dracopt::cpu::kernels().isa; });
  m.def("cuda_unavailable", &dracopt::cuda::unavailable, py::arg("device"));
  m.def("cuda_architectures", &dracopt::cuda::architectures);
  py::class_<dracopt::StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init<const std::string&, std::string>(), py::arg("rule"), py::arg("optimizer"))
      .def(
          "step",
          [](dracopt::StepPlan& plan, py::handle param_groups, py::handle state, double grad_scale,
             const std::pair<std::optional<at::Tensor>, std::optional<at::Tensor>>& scaler, std::optional<Runs> created,
             Indices stepped) {
            return plan.step(param_groups, state, grad_scale,
                             {scaler.first.value_or(at::Tensor()), scaler.second.value_or(at::Tensor())},
                             std::move(created), std::move(stepped));
          },
          py::arg("param_groups"), py::arg("state"), py::arg("grad_scale") = 1.0,
          py::arg("scaler") = py::make_tuple(py::none(), py::none()), py::arg("created") = py::none(),
          py::arg("stepped") = Indices())
      .def_property_readonly("updated", &dracopt::StepPlan::updated)
      .def_property_readonly("launches", &dracopt::StepPlan::launches);
}
