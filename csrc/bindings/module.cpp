#include <torch/csrc/utils/pybind.h>

#include "bindings/step_plan.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace py = pybind11;

using Scaler = std::pair<std::optional<at::Tensor>, std::optional<at::Tensor>>;  // found_inf and grad_scale

PYBIND11_MODULE(_C, m) {
  if (dracopt::cpu::interface() != DRACOPT_INTERFACE) {
    throw py::import_error("libdracopt_kernels.so is of another build than its binding. Build both again");
  }
  dracopt::cpu::kernels();  // a wrong DRACOPT_ISA must fail the import, not the first step
  m.def("isa", [] { return dracopt::cpu::kernels().isa; });
  m.def("cuda_unavailable", &dracopt::cuda::unavailable, py::arg("device"));
  m.def("cuda_architectures", &dracopt::cuda::architectures);
  py::class_<dracopt::StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init<const std::string&, std::string>(), py::arg("rule"), py::arg("optimizer"))
      .def(
          "step",
          [](dracopt::StepPlan& plan, py::handle param_groups, py::handle state, double grad_scale,
             const Scaler& scaler, std::optional<std::vector<dracopt::Run>> created,
             std::optional<std::vector<dracopt::Index>> stepped, const std::optional<std::string>& only_on,
             const std::optional<std::string>& not_on, bool only_looks) -> py::object {
            const auto type_of = [](const std::optional<std::string>& name) {
              return name.has_value() ? std::make_optional(c10::Device(*name).type()) : std::nullopt;
            };
            return plan.step(param_groups, state,
                             {.grad_scale = grad_scale,
                              .scaler = {scaler.first.value_or(at::Tensor()), scaler.second.value_or(at::Tensor())},
                              .created = std::move(created),
                              .stepped = std::move(stepped).value_or(std::vector<dracopt::Index>()),
                              .only_on = type_of(only_on),
                              .not_on = type_of(not_on),
                              .only_looks = only_looks});
          },
          py::arg("param_groups"), py::arg("state"), py::arg("grad_scale") = 1.0,
          py::arg("scaler") = py::make_tuple(py::none(), py::none()), py::arg("created") = py::none(),
          py::arg("stepped") = py::none(), py::arg("only_on") = py::none(), py::arg("not_on") = py::none(),
          py::arg("only_looks") = false)
      .def_property_readonly("updated", &dracopt::StepPlan::updated)
      .def_property_readonly("launches", &dracopt::StepPlan::launches);
}
