// An inventory holds the parameters of one step, and what its passes find out about them.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/backends.h"
#include "bindings/tensor_facts.h"
#include "core/layout.h"
#include "core/rule_entry.h"
#include "core/segment.h"

namespace dracopt {

using Index = std::pair<int, int>;      // the index of a group, and of a parameter in it
using Run = std::tuple<int, int, int>;  // the indices of a group, of its first parameter in the run, and after the last

// Terms are the facts of a group on which examine() depends.
struct Terms {
  int states = -1;
  bool fused, capturable;
  const char* unsupported;    // why torch must step the whole group; null if it need not
  std::optional<Device> gpu;  // the device of hyperparameters that the kernel reads

  bool operator==(const Terms&) const = default;
};

// A parameter group as this step finds it.
struct Group : Terms {
  PyObject* dict;
  PyObject* params;
  uint64_t version;    // of the dict, when it was read
  bool lasts;          // what was read can change only with the dict
  Terms examined_for;  // the terms by which parameters were last examined
  bool same_terms;     // `examined_for` equals the terms of this step
  int index;
  bool maximize;
  double hyperparameters[kMaxHyperparameters];
  bool reads_memory;                           // some hyperparameter is a tensor
  uint8_t bytes[kMaxHyperparameters];          // the k-th hyperparameter's size if it is a tensor; otherwise 0
  const void* addresses[kMaxHyperparameters];  // of hyperparameters that are tensors
  uint16_t fp32_address, fp64_address;         // bit k: the kernel reads the k-th in that dtype
};

// A parameter with its gradient and what was found in its state. Pointers are borrowed, and null if missing.
// Distributed tensors are replaced by their local tensors, except in `parameter`: see local_tensors.h.
struct Located {
  uint32_t group, index : 31;
  bool has_state : 1;               // the state is not empty
  PyObject* parameter;              // as the group has it
  PyObject* local;                  // holds the parameter's elements
  Tensor tensor;                    // in `local`
  Tensor grad;                      // undefined if the step passes over the parameter
  PyObject* entries;                // the state
  uint64_t version;                 // of the state, when the values were read; 0 if they must be read again
  PyObject* values[kMaxStateKeys];  // the state's scalars, then its tensors
  Tensor tensors[kMaxStateKeys];    // in the values. Until the parameter is examined, these are an earlier step's
  bool knows_state;                 // `entries` is right for as long as nobody edits the dict of all states
  uint8_t wanted, states;           // values that were read, and those of them that the rule updates

  Tensor param() const { return tensor; }
};

// The tensors of a parameter that will be read and written: the parameter, its gradient, its states.
struct Streams {
  uint8_t count;
  Backend backend;
  bool on_gpu;
  bool strided;   // the streams do not all lie alike without gaps
  bool has_gaps;  // some stream extends over more than its elements
  int8_t device_index;
};

// The parameter can be updated.
struct Ready {
  Streams streams;
  Arithmetic arithmetic;
  bool has_recipe;  // the kernel prepares the scalars
  bool first;       // the state's streams hold nothing yet, and no state scalar tells so
  uint8_t dtypes[kMaxStreams], scalar_dtypes[kMaxStateScalars];  // torch's numbers
  uint8_t itemsizes[kMaxStreams], reals;                         // of an element; numbers in the parameter's
  bool scalar_fp32[kMaxStateScalars], scalar_on_gpu[kMaxStateScalars];
  uint32_t group;  // by whose terms the parameter was examined
  void* scalar_data[kMaxStateScalars];
};

// AsBefore holds what is_as_before() finds.
struct AsBefore {
  void* gradient;            // its place
  bool as_recorded = false;  // the host's state scalars are those that the step before left
};

// The parameter has no state yet, so its streams are only the parameter and the gradient.
struct MissingState {
  Streams streams;
};

// The kernels do not serve the parameter.
struct Unsupported {
  const char* reason;
};

enum class Fault : uint8_t { no_tensor, distribution, device, shape, dtype, expanded, memory, missing };

// One of the parameter's tensors cannot be right. `culprit` is the index of a state's value, or one of the constants.
struct Wrong {
  static constexpr int kGradient = -1, kParameter = -2;
  Fault fault;
  int8_t culprit;
};

// The parameter has no gradient, or torch has stepped it already.
struct PassedOver {};

using Examined = std::variant<PassedOver, Ready, MissingState, Unsupported, Wrong>;

// Says of which mesh the processes hold a distributed parameter, and along which dimensions they hold equal parts.
struct MeshPart {
  PyObject* mesh;
  uint32_t replicated;  // bit d: dimension d of the mesh

  bool operator==(const MeshPart&) const = default;
};

// A distribution says what is known of a distributed parameter. It is empty for any other parameter.
struct Distribution {
  MeshPart part;                    // if the kernels can update the local tensors
  const char* unsupported;          // why kernels cannot update the local tensors; null if they can
  std::optional<Wrong> wrong;       // which tensor cannot be right
  PyObject* states[kMaxStateKeys];  // the distributed tensors around Located::values; null where those are plain
};

// Returns null if kernels will not update the parameter.
inline const Streams* streams_of(const Examined& examined) {
  if (const auto* ready = std::get_if<Ready>(&examined)) return &ready->streams;
  if (const auto* missing = std::get_if<MissingState>(&examined)) return &missing->streams;
  return nullptr;
}

// Counts the places of an inventory by what was found there.
struct Tally {
  size_t ready[kBackends][2];  // by backend, on the CPU and on GPUs
  size_t missing_states, unsupported;
  size_t on_gpus;     // ready or missing their states
  int64_t cpu_units;  // of what the CPU's kernels will update

  size_t on_cpu() const { return ready[static_cast<int>(Backend::cpu)][0]; }
  size_t all() const {
    size_t sum = missing_states + unsupported;
    for (const auto& of_backend : ready) sum += of_backend[0] + of_backend[1];
    return sum;
  }
};

// An inventory has a place for each parameter of the groups, in their order. A place keeps what one step has found, and
// the next step compares.
struct Inventory {
  const RuleEntry& rule;
  const Master masters;  // of parameters in 16 bits
  std::vector<Group> groups;
  std::vector<Tensor> hyperparameters_on_gpus;  // of all groups, if the kernels read them
  std::vector<Located> located;
  std::vector<Distribution> distributions;   // one for each place; empty if no parameter is distributed
  bool has_subclasses = false;               // some parameter is a tensor of a subclass
  PyTypeObject* distributed_type = nullptr;  // of distributed tensors; null if there can be none
  bool replicates = false;                   // torch takes plain tensors for replicated ones
  std::vector<Examined> examined;            // one for each place, as the segments
  std::vector<Segment> segments;
  std::deque<Layout> layouts;
  std::vector<Rounding> roundings;  // one for each place, if streams are rounded at random
  std::deque<Layout> numbers;       // the layouts to which `roundings` point
  Tally tally{};
  uint64_t version = 1;      // changes with what was found at any place, except with where gradients lie
  bool as_recorded = false;  // the host's state scalars are those that the step before left

  size_t size() const { return located.size(); }
  const Group& group_of(size_t i) const { return groups[located[i].group]; }
  Index index_of(size_t i) const { return {located[i].group, located[i].index}; }

  // Returns null if no parameter is distributed.
  const Distribution* distribution_of(size_t i) const { return distributions.empty() ? nullptr : &distributions[i]; }

  // Returns the k-th value of a parameter's state, as the state has it.
  PyObject* state_object(size_t i, int k) const {
    PyObject* const distributed = distributions.empty() ? nullptr : distributions[i].states[k];
    return distributed == nullptr ? located[i].values[k] : distributed;
  }

  // Says whether a distributed parameter cannot be updated by kernels.
  bool is_set_apart(size_t i) const {
    const Distribution* const distribution = distribution_of(i);
    return distribution != nullptr && (distribution->wrong.has_value() || distribution->unsupported != nullptr);
  }

  bool is_distributed(const PyObject* object) const { return Py_TYPE(object) == distributed_type; }

  // Says whether torch takes a plain tensor where it has distributed ones.
  bool may_mix(Tensor plain) const { return replicates || plain.numel() == 1; }

  static Device device_of(const Streams& streams) {
    return streams.on_gpu ? Device{kGpuType, streams.device_index} : kHost;
  }

  bool has_master(const Located& located) const {
    const Format& format = format_of(located.tensor);
    return masters != Master::none && format.is_native && format.bytes() == 2;
  }

  // Returns how many scalars and tensors a parameter's state must have. The master is the last.
  int wanted_values(const Located& located) const {
    return rule.state_scalars + groups[located.group].states + has_master(located);
  }

  // Counts the places, and gives the segments for the CPU their unit numbers.
  void count() {
    tally = {};
    for (size_t i = 0; i < size(); ++i) {
      const Streams* const streams = streams_of(examined[i]);
      if (streams != nullptr && streams->on_gpu) ++tally.on_gpus;
      if (std::holds_alternative<MissingState>(examined[i])) ++tally.missing_states;
      if (std::holds_alternative<Unsupported>(examined[i])) ++tally.unsupported;
      if (!std::holds_alternative<Ready>(examined[i])) continue;
      ++tally.ready[static_cast<int>(streams->backend)][streams->on_gpu];
      if (streams->backend == Backend::cpu) append_units(segments[i], tally.cpu_units);
    }
  }

  // Returns the tensor of a stream, which must exist.
  Tensor tensor_of(size_t i, int stream) const {
    if (stream == kParam) return located[i].param();
    if (stream == kGrad) return located[i].grad;
    return Tensor::in(located[i].values[rule.state_scalars + stream - kFirstState]);
  }

  // Returns the bytes over which a stream extends.
  int64_t bytes_of(size_t i, int stream) const {
    if (!streams_of(examined[i])->strided) return segments[i].numel * itemsize(segments[i].dtypes[stream]);
    const Tensor tensor = tensor_of(i, stream);
    return extent_of(tensor) * format_of(tensor).bytes();
  }

  // Reads the state scalars as they are before this step. The host knows no values of those on a GPU.
  void read_state_scalars(const Ready& ready, StateScalar* scalars) const {
    for (int k = 0; k < rule.state_scalars; ++k) {
      double value = 0;
      if (!ready.scalar_on_gpu[k]) {
        const void* const data = ready.scalar_data[k];
        value = ready.scalar_fp32[k] ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
      }
      scalars[k] = {value, ready.scalar_fp32[k]};
    }
  }
};

}  // namespace dracopt
