#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <optional>

#include "bindings/gradients.h"
#include "bindings/step_plan.h"
#include "core/squares.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace dracopt {
namespace {

Tensor tensor_or_none(const py::object& object) {
  if (object.is_none()) return Tensor();
  if (!is_tensor(object.ptr())) throw py::type_error("scaler must hold tensors or None");
  return Tensor::in(object.ptr());
}

std::optional<Clipping> clipping_or_none(const py::object& object) {
  if (object.is_none()) return {};
  const auto [max_norm, norm, checks, needs_a_norm, add_over_meshes] =
      object.cast<std::tuple<double, py::object, bool, bool, py::object>>();
  if (!is_tensor(norm.ptr())) throw py::type_error("clipping must hold a tensor for the norm");
  return Clipping{max_norm, Tensor::in(norm.ptr()), checks, needs_a_norm, add_over_meshes};
}

std::optional<StepPlan::AtRandom> at_random_or_none(const py::object& object) {
  if (object.is_none()) return {};
  auto [seed, states, steps, first_param, shards] =
      object.cast<std::tuple<uint64_t, bool, std::vector<uint32_t>, uint32_t, std::vector<StepPlan::Shard>>>();
  return StepPlan::AtRandom{seed, states, std::move(steps), first_param, std::move(shards)};
}

Master master_named(const std::optional<std::string>& name) {
  if (!name.has_value()) return Master::none;
  if (*name != "fp32" && *name != "split16") throw py::value_error("no form of masters is named '" + *name + "'");
  return *name == "fp32" ? Master::fp32 : Master::split16;
}

py::tuple names_in(const char* const* names) {
  py::list found;
  for (; *names != nullptr; ++names) found.append(*names);
  return py::tuple(found);
}

const char* name_of(KeyKind kind) {
  switch (kind) {
    case KeyKind::number:
      return "number";
    case KeyKind::decay_rates:
      return "decay_rates";
    case KeyKind::flag:
      return "flag";
  }
  return nullptr;
}

// Describes the rules to Python: for each name, the attributes of dracopt_ext/_C.pyi's Rule.
py::dict rules() {
  const auto rule_type = py::module_::import("collections")
                             .attr("namedtuple")("Rule", py::make_tuple("group_keys", "hyperparameters",
                                                                        "state_scalar_keys", "state_keys", "scalars"));
  py::dict found;
  for (const RuleEntry* rule = cpu::kernels().rules; rule != cpu::kernels().rules + cpu::kernels().rule_count; ++rule) {
    py::dict keys;
    for (const GroupKey* key = rule->group_keys; key->name != nullptr; ++key) keys[key->name] = name_of(key->kind);
    found[rule->name] = rule_type(keys, rule->hyperparameters, names_in(rule->state_scalar_keys),
                                  names_in(rule->state_keys), rule->scalar_bytes[0] / sizeof(float));
  }
  return found;
}

// Returns where the Triton kernel finds what a table and arguments hold, in bytes from the beginning of each struct.
py::dict launch_layout() {
  using namespace cuda;
  py::dict at;
  at["ROW_BYTES"] = sizeof(Row);
  at["STREAMS"] = offsetof(Row, streams);
  at["STATE_SCALARS"] = offsetof(Row, state_scalars);
  at["NUMEL"] = offsetof(Row, numel);
  at["ROW_FIRST"] = offsetof(Row, first);
  at["ROW_NUMBERS"] = offsetof(Row, numbers);
  at["PARAM"] = offsetof(Row, param);
  at["SEED"] = offsetof(Arguments, seed);
  at["SLOT"] = offsetof(Row, slot);
  at["LAYOUT"] = offsetof(Row, layout);
  at["DENSE"] = offsetof(Row, dense);
  at["STATE_SCALAR_FP32"] = offsetof(Row, state_scalar_fp32);
  at["MAXIMIZE"] = offsetof(Row, maximize);
  at["HAS_RECIPE"] = offsetof(Row, has_recipe);
  at["LAYOUT_BYTES"] = sizeof(Layout);
  at["DIMS"] = offsetof(Layout, dims);
  at["SIZES"] = offsetof(Layout, sizes);
  at["STRIDES"] = offsetof(Layout, strides);
  at["STRIDES_BYTES"] = sizeof(Layout::strides[0]);
  at["ROWS"] = offsetof(Arguments, rows);
  at["LAYOUTS"] = offsetof(Arguments, layouts);
  at["FIRST_TILES"] = offsetof(Arguments, first_tiles);
  at["FINISHED"] = offsetof(Arguments, finished);
  at["FOUND_INF"] = offsetof(Arguments, found_inf);
  at["GRAD_SCALE"] = offsetof(Arguments, grad_scale);
  at["MULTIPLIER"] = offsetof(Arguments, multiplier);
  at["DIVISOR"] = offsetof(Arguments, divisor);
  at["COEFFICIENT"] = offsetof(Arguments, coefficient);
  at["NORM"] = offsetof(Arguments, norm);
  at["NORM_OUT"] = offsetof(Arguments, norm_out);
  at["MAX_NORM"] = offsetof(Arguments, max_norm);
  at["BLOCKS_IN_ALL"] = offsetof(Arguments, blocks_in_all);
  at["CHECKS"] = offsetof(Arguments, checks);
  at["ZEROES"] = offsetof(Arguments, zeroes);
  at["COUNT"] = offsetof(Arguments, count);
  at["BLOCKS"] = offsetof(Arguments, blocks);
  at["WORDS"] = offsetof(Arguments, words);
  at["CHUNK"] = kChunk;
  at["CHUNK_ROW"] = kRow;
  at["GRAD_IS_SIMPLE"] = kGradIsSimple;
  at["SUM_BYTES"] = sizeof(ExactSum);
  at["SUMS"] = Norm::kSums;
  at["DIGITS"] = ExactSum::kDigits;
  at["NORM_COEFFICIENT"] = offsetof(Norm, coefficient);
  at["NORM_FINISHED"] = offsetof(Norm, finished);
  at["FP32_ADDRESS"] = offsetof(Recipe, fp32_address);
  at["FP64_ADDRESS"] = offsetof(Recipe, fp64_address);
  at["RECIPE_FIRST"] = offsetof(Recipe, first);
  at["RECIPE_WORDS"] = offsetof(Recipe, words);
  return at;
}

Triton make_triton(py::object make_launcher, py::object is_capturing, int64_t tile, bool on_cpu,
                   const std::vector<std::optional<std::string>>& no_kernels) {
  Triton triton{std::move(make_launcher), std::move(is_capturing), tile, on_cpu, {}};
  for (const auto& why : no_kernels) triton.no_kernels.push_back(why.has_value() ? lasting(*why) : nullptr);
  return triton;
}

}  // namespace
}  // namespace dracopt

PYBIND11_MODULE(_C, m) {
  using namespace dracopt;
  if (cpu::interface() != DRACOPT_INTERFACE) {
    throw py::import_error("libdracopt_kernels.so is of another build than its binding. Build both again");
  }
  cpu::kernels();  // a wrong DRACOPT_ISA must fail the import, not the first step
  define_places(m);
  define_gradients(m);
  m.def("isa", [] { return cpu::kernels().isa; });
  m.def("cuda_unavailable", &cuda::unavailable, py::arg("device"));
  m.def("cuda_architectures", &cuda::architectures);
  m.def("rules", &rules);
  m.def("launch_layout", &launch_layout);
  py::class_<Triton>(m, "Triton", py::module_local())
      .def(py::init(&make_triton), py::arg("make_launcher"), py::arg("is_capturing"), py::arg("tile"),
           py::arg("on_cpu"), py::arg("no_kernels"));
  py::class_<StepPlan>(m, "StepPlan", py::module_local())
      .def(py::init([](const std::string& rule, std::string optimizer, bool cpu, bool cuda,
                       std::optional<Triton> triton, const std::optional<std::string>& masters) {
             return std::make_unique<StepPlan>(rule, std::move(optimizer), Backends(cpu, cuda, std::move(triton)),
                                               master_named(masters));
           }),
           py::arg("rule"), py::arg("optimizer"), py::arg("cpu"), py::arg("cuda"), py::arg("triton"),
           py::arg("masters") = py::none())
      .def(
          "step",
          [](StepPlan& plan, py::handle param_groups, py::handle state, double grad_scale,
             const std::pair<py::object, py::object>& scaler, const py::object& coefficient, const py::object& clipping,
             std::optional<std::vector<Run>> created, std::optional<std::vector<Index>> stepped, bool zeroes,
             const py::object& at_random, bool only_looks) -> py::object {
            const bool on_gpu = is_tensor(coefficient.ptr());
            return plan.step(param_groups, state,
                             {.grad_scale = grad_scale,
                              .coefficient = on_gpu ? 1 : coefficient.cast<double>(),
                              .scaler = {tensor_or_none(scaler.first), tensor_or_none(scaler.second),
                                         on_gpu ? Tensor::in(coefficient.ptr()) : Tensor()},
                              .clipping = clipping_or_none(clipping),
                              .created = std::move(created),
                              .stepped = std::move(stepped).value_or(std::vector<Index>()),
                              .zeroes = zeroes,
                              .at_random = at_random_or_none(at_random),
                              .only_looks = only_looks});
          },
          py::arg("param_groups"), py::arg("state"), py::arg("grad_scale") = 1.0,
          py::arg("scaler") = py::make_tuple(py::none(), py::none()), py::arg("coefficient") = 1.0,
          py::arg("clipping") = py::none(), py::arg("created") = py::none(), py::arg("stepped") = py::none(),
          py::arg("zeroes") = false, py::arg("at_random") = py::none(), py::arg("only_looks") = false)
      .def_property_readonly("zeroed", &StepPlan::zeroed)
      .def_property_readonly("updated", &StepPlan::updated)
      .def_property_readonly("launches", &StepPlan::launches);
}
