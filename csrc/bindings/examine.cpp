#include "bindings/examine.h"

#include <cmath>
#include <optional>
#include <vector>

namespace dracopt {
namespace {

constexpr double kMaxStep = 9007199254740992.0;  // 2^53: a double cannot count beyond this

constexpr char kMisaligned[] = "addresses that are no multiples of an element's size";
constexpr char kLazilyCloned[] = "lazily cloned tensors";
constexpr char kMayOverlapItself[] = "strides by which elements may share memory";

Examined unsupported(const char* reason) { return Unsupported{reason}; }
Examined wrong(Fault fault, int culprit) { return Wrong{fault, static_cast<int8_t>(culprit)}; }

// Says why a tensor cannot be the gradient or a moment of a plain parameter.
std::optional<Fault> fault_of(Tensor tensor, Tensor param) {
  if (tensor.is_python_subclass()) return {};
  if (tensor.device() != param.device()) return Fault::device;
  if (!same_shape(tensor, param)) return Fault::shape;
  if (tensor.dtype() == param.dtype()) return {};
  const Format& format = format_of(tensor);
  if (!format.is_native || format.is_complex != format_of(param).is_complex) return Fault::dtype;
  return {};
}

// Says why a tensor cannot be a state scalar. A scalar may have any dtype, and a parameter on a GPU may have scalars on
// the CPU.
std::optional<Fault> fault_of_scalar(Tensor tensor, Tensor param) {
  if (tensor.is_python_subclass()) return {};
  // CPU kernels need the scalar on the CPU; GPU kernels take it from either place.
  if (!tensor.is_plain_on_cpu() && tensor.device() != param.device()) return Fault::device;
  if (tensor.numel() != 1) return Fault::shape;
  return {};
}

// Holds a value if a function has found that the parameter is not ready.
using Otherwise = std::optional<Examined>;

Otherwise examine_param(const Group& group, const Backends& backends, const Located& located, bool inference_mode,
                        Backend& backend) {
  const Tensor p = located.param();
  if (group.unsupported != nullptr) return unsupported(group.unsupported);
  if (!is_exact_tensor(located.local)) return unsupported(kSubclasses);
  if (p.is_python_subclass() || !p.is_strided()) return unsupported(why_not_plain(p));
  const auto [found, why_not] = backends.for_device(p.device());
  if (why_not != nullptr) return unsupported(why_not);
  if (!is_plain(p)) return unsupported(why_not_plain(p));
  backend = found;
  // On the CPU, torch takes capturable only together with fused, where it means nothing.
  if (!p.is_plain_on_gpu() && group.capturable && !group.fused) return unsupported("capturable=True");
  if (group.gpu.has_value() && p.device() != *group.gpu) return unsupported("hyperparameters on another device");
  if (is_expanded(p)) return wrong(Fault::expanded, Wrong::kParameter);
  if (may_overlap_itself(p)) return unsupported(kMayOverlapItself);
  const Format& format = format_of(p);
  if (!format.is_native) return unsupported("these dtypes");
  if (format.is_complex && group.fused) return unsupported("complex parameters with fused=True");
  if (p.is_inference() && !inference_mode) return unsupported("inference tensors");
  if (p.is_lazily_cloned()) return unsupported(kLazilyCloned);
  return {};
}

Otherwise examine_state_scalar(Tensor tensor, int k, Ready& ready) {
  const Format& format = format_of(tensor);
  if (!format.is_native || format.is_complex || format.bytes() < 4) {
    return unsupported("scalars of a state in this dtype");
  }
  if (lacks_memory(tensor, 1, format.bytes())) return wrong(Fault::memory, k);
  void* const data = data_of(tensor);
  if (!is_aligned(data, format.dtype)) return unsupported(kMisaligned);
  ready.scalar_data[k] = data;
  ready.scalar_fp32[k] = format.dtype == Dtype::fp32;
  ready.scalar_on_gpu[k] = !tensor.is_plain_on_cpu();
  if (ready.scalar_on_gpu[k]) {
    ready.has_recipe = true;
    return {};
  }
  // The host cannot read the numbers on the GPU that it would need to advance this scalar.
  if (k > 0 && ready.has_recipe) {
    return unsupported("a state on the CPU beside numbers on the GPU that it depends on");
  }
  const double value = number_at(data, format.dtype);
  if (k == 0 && !(value >= 0 && value < kMaxStep && std::floor(value) == value)) {
    return unsupported("step counts that are not natural numbers");
  }
  return {};
}

// Examines a state that is complete.
Otherwise examine_state(const Inventory& inventory, const Located& located, int wanted, Ready& ready) {
  const Tensor p = located.param();
  for (int k = 0; k < wanted; ++k) {
    if (!is_exact_tensor(located.values[k])) {
      if (!is_tensor(located.values[k])) return wrong(Fault::no_tensor, k);
      const bool is_mixed = inventory.is_distributed(located.values[k]) && k >= inventory.rule.state_scalars;
      if (is_mixed && !inventory.may_mix(p)) return wrong(Fault::distribution, k);
      return unsupported("states that are tensor subclasses");
    }
    const Tensor s = Tensor::in(located.values[k]);
    const bool is_scalar = k < inventory.rule.state_scalars;
    if (const auto fault = is_scalar ? fault_of_scalar(s, p) : fault_of(s, p)) return wrong(*fault, k);
    if (!is_plain(s)) return unsupported(why_not_plain(s));
    if (s.is_lazily_cloned()) return unsupported(kLazilyCloned);
    if (is_scalar) {
      if (auto otherwise = examine_state_scalar(s, k, ready)) return otherwise;
    } else {
      if (is_expanded(s)) return wrong(Fault::expanded, k);
      if (may_overlap_itself(s)) return unsupported(kMayOverlapItself);
    }
  }
  return {};
}

// Examines the memory of streams that are otherwise in order, and fills the segment.
Otherwise examine_memory(const Inventory& inventory, size_t i, Streams& streams, bool& fp64, Segment& segment) {
  const Tensor p = inventory.located[i].param();
  const Format& format = format_of(p);
  const bool dense = p.is_non_overlapping_and_dense(), contiguous = p.is_contiguous();
  for (int k = 0; k < streams.count; ++k) {
    const Tensor tensor = inventory.tensor_of(i, k);
    const Format& stored = format_of(tensor);
    void* const data = data_of(tensor);
    const bool simple = contiguous && tensor.is_contiguous();
    const int64_t extent = simple ? p.numel() : extent_of(tensor);
    if (lacks_memory(tensor, extent, stored.bytes())) {
      return wrong(Fault::memory, k == kParam  ? Wrong::kParameter
                                  : k == kGrad ? Wrong::kGradient
                                               : inventory.rule.state_scalars + k - kFirstState);
    }
    if (!is_aligned(data, stored.dtype) && extent > 0) return unsupported(kMisaligned);
    segment.data[k] = data;
    segment.dtypes[k] = stored.dtype;
    segment.dense[k] = true;
    fp64 |= stored.dtype == Dtype::fp64;
    streams.has_gaps |= !simple && !tensor.is_non_overlapping_and_dense();
    streams.strided |= !simple && !(dense && are_equal(tensor.strides(), p.strides()));
  }
  streams.strided &= p.numel() > 0;
  segment.layout = nullptr;
  segment.numel = p.numel() * format.reals();
  segment.unit_numel = kUnitBytes / itemsize(format.dtype);
  return {};
}

}  // namespace

Examined examine(const Inventory& inventory, const Backends& backends, size_t i, bool inference_mode,
                 Segment& segment) {
  const Located& located = inventory.located[i];
  const Group& group = inventory.group_of(i);
  Streams streams{};
  // This comes first, because all processes must agree on what torch steps: its steps may communicate.
  const Distribution* const distribution = inventory.distribution_of(i);
  if (distribution != nullptr && distribution->wrong.has_value()) return *distribution->wrong;
  if (distribution != nullptr && distribution->unsupported != nullptr) return unsupported(distribution->unsupported);
  if (auto otherwise = examine_param(group, backends, located, inference_mode, streams.backend)) return *otherwise;
  if (const auto fault = fault_of(located.grad, located.param())) return wrong(*fault, Wrong::kGradient);
  if (!is_plain(located.grad)) return unsupported(why_not_plain(located.grad));

  streams.on_gpu = located.param().is_plain_on_gpu();
  bool fp64 = false;
  const int wanted = inventory.wanted_values(group);
  for (int k = 0; k < wanted; ++k) {
    if (located.values[k] != nullptr && located.values[k] != Py_None) continue;
    // A rule with state scalars creates the state as a whole, as torch does, so a partial state is a mistake.
    if (inventory.rule.state_scalars > 0 && located.has_state) return wrong(Fault::missing, k);
    streams.count = kFirstState;
    MissingState missing{streams};
    if (auto otherwise = examine_memory(inventory, i, missing.streams, fp64, segment)) return *otherwise;
    return missing;
  }
  Ready ready{};
  streams.count = static_cast<uint8_t>(kFirstState + group.states);
  ready.streams = streams;
  ready.has_recipe = group.gpu.has_value();
  if (auto otherwise = examine_state(inventory, located, wanted, ready)) return *otherwise;
  if (auto otherwise = examine_memory(inventory, i, ready.streams, fp64, segment)) return *otherwise;
  ready.arithmetic = fp64 ? Arithmetic::fp64 : Arithmetic::fp32;
  return ready;
}

Layout layout_of(const Inventory& inventory, size_t i) {
  const Tensor p = inventory.located[i].param();
  const bool is_complex = format_of(p).is_complex;
  const int streams = streams_of(inventory.examined[i])->count;
  std::vector<int64_t> sizes(p.sizes().begin(), p.sizes().end()), strides[kMaxStreams];
  const int64_t* pointers[kMaxStreams];
  if (is_complex) sizes.push_back(2);
  for (int k = 0; k < streams; ++k) {
    for (int64_t stride : inventory.tensor_of(i, k).strides()) strides[k].push_back(is_complex ? 2 * stride : stride);
    if (is_complex) strides[k].push_back(1);
    pointers[k] = strides[k].data();
  }
  return make_layout(static_cast<int>(sizes.size()), sizes.data(), streams, pointers);
}

}  // namespace dracopt
