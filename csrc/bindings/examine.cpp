#include "bindings/examine.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "bindings/updates.h"

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

// Says why a tensor cannot be the master of a plain parameter.
std::optional<Fault> fault_of_master(Tensor tensor, Tensor param, Master form) {
  const std::optional<Fault> fault = fault_of(tensor, param);
  if (tensor.is_python_subclass() || (fault.has_value() && *fault != Fault::dtype)) return fault;
  if (tensor.dtype() != (form == Master::fp32 ? kFp32 : kBf16)) return Fault::dtype;
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

bool is_step_count(double value) {
  return value >= 0 && value < kMaxStep && static_cast<double>(static_cast<int64_t>(value)) == value;
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
  ready.scalar_dtypes[k] = static_cast<uint8_t>(tensor.dtype());
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
  if (k == 0 && !is_step_count(number_at(data, format.dtype))) {
    return unsupported("step counts that are not natural numbers");
  }
  return {};
}

// Examines a state that is complete.
Otherwise examine_state(const Inventory& inventory, const Located& located, Ready& ready) {
  const Tensor p = located.param();
  const int master_at = inventory.rule.state_scalars + inventory.groups[located.group].states;
  for (int k = 0; k < located.wanted; ++k) {
    if (!is_exact_tensor(located.values[k])) {
      if (!is_tensor(located.values[k])) return wrong(Fault::no_tensor, k);
      const bool is_mixed = inventory.is_distributed(located.values[k]) && k >= inventory.rule.state_scalars;
      if (is_mixed && !inventory.may_mix(p)) return wrong(Fault::distribution, k);
      return unsupported("states that are tensor subclasses");
    }
    const Tensor s = Tensor::in(located.values[k]);
    const bool is_scalar = k < inventory.rule.state_scalars;
    const auto fault = is_scalar        ? fault_of_scalar(s, p)
                       : k == master_at ? fault_of_master(s, p, inventory.masters)
                                        : fault_of(s, p);
    if (fault.has_value()) return wrong(*fault, k);
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

// Says whether the values of a state are a master and none of the rule's, as other libraries' checkpoints may have
// them.
bool has_only_master(const Located& located, int of_rule) {
  const auto is_there = [](PyObject* value) { return value != nullptr && value != Py_None; };
  return located.wanted > of_rule && is_there(located.values[of_rule]) &&
         std::none_of(located.values, located.values + of_rule, is_there);
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
  streams.device_index = static_cast<int8_t>(located.param().device().index);
  bool fp64 = false;
  const int scalars = inventory.rule.state_scalars;
  for (int k = 0; k < located.wanted; ++k) {
    if (located.values[k] != nullptr && located.values[k] != Py_None) continue;
    // A rule with state scalars creates the state as a whole, as torch does, so a partial state is a mistake. So is a
    // state without a master.
    const int of_rule = scalars + group.states;
    const bool lacks_only_master = k > 0 && k == of_rule;
    if ((scalars > 0 && located.has_state && !has_only_master(located, of_rule)) || lacks_only_master) {
      return wrong(Fault::missing, k);
    }
    streams.count = kFirstState;
    MissingState missing{streams};
    if (auto otherwise = examine_memory(inventory, i, missing.streams, fp64, segment)) return *otherwise;
    return missing;
  }
  Ready ready{};
  streams.count = static_cast<uint8_t>(kFirstState + located.wanted - scalars);
  ready.streams = streams;
  ready.has_recipe = group.gpu.has_value();
  ready.group = located.group;
  if (auto otherwise = examine_state(inventory, located, ready)) return *otherwise;
  if (auto otherwise = examine_memory(inventory, i, ready.streams, fp64, segment)) return *otherwise;
  for (int k = 0; k < streams.count; ++k) {
    const Tensor tensor = inventory.tensor_of(i, k);
    ready.dtypes[k] = static_cast<uint8_t>(tensor.dtype());
    ready.itemsizes[k] = static_cast<uint8_t>(format_of(tensor).bytes());
  }
  if (inventory.has_master(located)) segment.master = inventory.masters;
  ready.reals = static_cast<uint8_t>(format_of(located.param()).reals());
  ready.arithmetic = fp64 ? Arithmetic::fp64 : Arithmetic::fp32;
  return ready;
}

namespace {

// Says whether a tensor's storage holds `bytes` bytes from its first element on, and where this lies.
DRACOPT_INLINE bool has_memory(const TensorFacts& facts, int64_t itemsize, int64_t bytes, void*& data) {
  const int64_t offset = facts.storage_offset * itemsize;
  data = reinterpret_cast<void*>(facts.storage + static_cast<uintptr_t>(offset));
  return offset + bytes <= facts.storage_bytes;
}

// Says whether `numel` elements that are written lie at an address.
DRACOPT_INLINE bool is_at(const TensorFacts& facts, const void* data, int64_t itemsize, int64_t numel) {
  void* found;
  return has_memory(facts, itemsize, numel * itemsize, found) && found == data && !facts.is_lazily_cloned;
}

// Says whether a tensor is plain and on the parameter's device.
template <bool on_gpu>
DRACOPT_INLINE bool is_beside(Tensor tensor, Tensor p, int device_index) {
  const bool is_alike =
      tensor.key_set() == p.key_set() || (on_gpu ? tensor.is_plain_on_gpu() : tensor.is_plain_on_cpu());
  return is_alike && (!on_gpu || tensor.gpu_index() == device_index);
}

// Says whether a tensor's elements lie as those of the parameter, which has no gaps.
DRACOPT_INLINE bool lies_like(Tensor tensor, const TensorFacts& facts, Tensor p, const TensorFacts& param) {
  if (facts.dims != param.dims) return false;
  bool same_strides = true;
  for (size_t d = 0; d < param.dims; ++d) {
    if (facts.sizes[d] != param.sizes[d]) return false;
    same_strides &= facts.strides[d] == param.strides[d];
  }
  return same_strides || (p.is_contiguous() && tensor.is_contiguous());
}

template <bool on_gpu>
bool is_as_before(Located& located, const Ready& ready, const Segment& segment, int scalars, bool inference_mode,
                  AsBefore& found) {
  const Tensor p = located.param();
  const int device_index = ready.streams.device_index;
  TensorFacts param;
  if (!(on_gpu ? p.is_plain_on_gpu() && p.gpu_index() == device_index : p.is_plain_on_cpu())) return false;
  if (!p.read(param) || param.dtype != ready.dtypes[kParam]) return false;
  if (param.numel * ready.reals != segment.numel || (p.is_inference() && !inference_mode)) return false;
  if (!p.is_non_overlapping_and_dense()) return false;
  if (!is_at(param, segment.data[kParam], ready.itemsizes[kParam], param.numel)) return false;

  {
    const Tensor gradient = located.grad;
    const int64_t itemsize = ready.itemsizes[kGrad];
    TensorFacts facts;
    if (!is_beside<on_gpu>(gradient, p, device_index) || !gradient.read(facts)) return false;
    if (facts.dtype != ready.dtypes[kGrad] || !lies_like(gradient, facts, p, param)) return false;
    if (!has_memory(facts, itemsize, param.numel * itemsize, found.gradient)) return false;
    if (!is_aligned(found.gradient, segment.dtypes[kGrad])) return false;
  }
  found.as_recorded = segment.update != nullptr;
  for (int k = 0; k < scalars; ++k) {
    PyObject* const value = located.values[k];
    if (value == nullptr || !is_exact_tensor(value)) return false;
    const Tensor scalar = located.tensors[k] = Tensor::in(value);
    const bool is_far = on_gpu && !ready.scalar_on_gpu[k];
    TensorFacts facts;
    if (!(is_far ? scalar.is_plain_on_cpu() : is_beside<on_gpu>(scalar, p, device_index))) return false;
    if (!scalar.read(facts) || facts.dtype != ready.scalar_dtypes[k] || facts.numel != 1) return false;
    const void* const data = ready.scalar_data[k];
    const bool fp32 = ready.scalar_fp32[k];
    if (!is_at(facts, data, fp32 ? 4 : 8, 1)) return false;
    if (ready.scalar_on_gpu[k]) continue;
    const double now = fp32 ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
    if (k == 0 && !is_step_count(now)) return false;
    found.as_recorded = found.as_recorded && prepared_of(segment).state_scalars[k].value == now;
  }
  for (int k = kFirstState; k < ready.streams.count; ++k) {
    PyObject* const value = located.values[scalars + k - kFirstState];
    if (value == nullptr || !is_exact_tensor(value)) return false;
    const Tensor state = located.tensors[scalars + k - kFirstState] = Tensor::in(value);
    TensorFacts facts;
    if (!is_beside<on_gpu>(state, p, device_index) || !state.read(facts)) return false;
    if (facts.dtype != ready.dtypes[k] || !lies_like(state, facts, p, param)) return false;
    if (!is_at(facts, segment.data[k], ready.itemsizes[k], param.numel)) return false;
  }
  return true;
}

}  // namespace

bool is_as_before(Located& located, const Ready& ready, const Segment& segment, int scalars, bool inference_mode,
                  AsBefore& found) {
  if (ready.group != located.group || ready.streams.strided || ready.streams.has_gaps) return false;
  return ready.streams.on_gpu ? is_as_before<true>(located, ready, segment, scalars, inference_mode, found)
                              : is_as_before<false>(located, ready, segment, scalars, inference_mode, found);
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
