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

// A parameter group as this step finds it.
struct Group {
  PyObject* dict;
  PyObject* params;
  int index;
  int states;
  bool maximize, fused, capturable;
  const char* unsupported;  // why torch must step the whole group; null if it need not
  double hyperparameters[kMaxHyperparameters];
  bool reads_memory;                           // some hyperparameter is a tensor
  uint8_t bytes[kMaxHyperparameters];          // the k-th hyperparameter's size if it is a tensor; otherwise 0
  const void* addresses[kMaxHyperparameters];  // of hyperparameters that are tensors
  std::optional<Device> gpu;                   // the device of hyperparameters that the kernel reads
  uint16_t fp32_address, fp64_address;         // bit k: the kernel reads the k-th in that dtype
};

// A parameter that has a gradient, with what was found in its state. Pointers are borrowed, and null if missing.
// Distributed tensors are replaced by their local tensors, except in `parameter`: see local_tensors.h.
struct Located {
  uint32_t group, index : 31;
  bool has_state : 1;   // the state is not empty
  PyObject* parameter;  // as the group has it
  PyObject* local;      // holds the parameter's elements
  Tensor grad;
  PyObject* values[kMaxStateKeys];  // the state's scalars, then its tensors

  Tensor param() const { return Tensor::in(local); }
};

// The tensors of a parameter that will be read and written: the parameter, its gradient, its states.
struct Streams {
  uint8_t count;
  Backend backend;
  bool on_gpu;
  bool strided;   // the streams do not all lie alike without gaps
  bool has_gaps;  // some stream extends over more than its elements
};

// The parameter can be updated.
struct Ready {
  Streams streams;
  Arithmetic arithmetic;
  bool has_recipe;  // the kernel prepares the scalars
  bool first;       // the state's streams hold nothing yet, and no state scalar tells so
  bool scalar_fp32[kMaxStateScalars], scalar_on_gpu[kMaxStateScalars];
  uint32_t update;  // the number of its update in this step
  void* scalar_data[kMaxStateScalars];
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

// torch has stepped the parameter already.
struct Stepped {};

using Examined = std::variant<Stepped, Ready, MissingState, Unsupported, Wrong>;

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

struct Inventory {
  const RuleEntry& rule;
  std::vector<Group> groups;
  std::vector<Tensor> hyperparameters_on_gpus;  // of all groups, if the kernels read them
  std::vector<Located> located;
  std::vector<Distribution> distributions;   // one for each located parameter; empty if none is distributed
  PyTypeObject* distributed_type = nullptr;  // of distributed tensors; null if there can be none
  bool replicates = false;                   // torch takes plain tensors for replicated ones
  // One for each located parameter. Entries beyond these are from an earlier step.
  std::vector<Examined> examined;
  std::vector<Segment> segments;
  std::deque<Layout> layouts;

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

  bool is_distributed(const PyObject* object) const { return Py_TYPE(object) == distributed_type; }

  // Says whether torch takes a plain tensor where it has distributed ones.
  bool may_mix(Tensor plain) const { return replicates || plain.numel() == 1; }

  // Returns how many scalars and tensors the state of a group's parameters must have.
  int wanted_values(const Group& group) const { return rule.state_scalars + group.states; }

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
