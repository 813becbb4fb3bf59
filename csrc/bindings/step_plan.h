// One optimizer step: reads what Python holds now, refuses what is wrong, and updates the rest.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/inventory.h"
#include "bindings/local_tensors.h"
#include "bindings/python_reader.h"
#include "bindings/runner.h"
#include "bindings/shared_memory.h"
#include "bindings/updates.h"

namespace dracopt {

// Belongs to one optimizer. Holds no tensor, and respects whatever a user did to groups, gradients and states since the
// step before. The plan remembers what that step found, and each step compares: dicts by their version, and of tensors
// all that examine() looks at. The plan works out anew what has changed.
class StepPlan {
 public:
  // `optimizer` is the name of the class, for errors.
  StepPlan(const std::string& rule, std::string optimizer, Backends backends, Master masters);

  // A shard is a parameter's part in this process: the number of its first element in the whole tensor, and the
  // distances between the whole tensor's elements by dimension.
  using Shard = std::tuple<int, int, int64_t, std::vector<int64_t>>;  // the first two are the indices of a parameter

  // Says how a step rounds at random.
  struct AtRandom {
    uint64_t seed;
    bool states;                  // whether states in 16 bits are rounded at random as well
    std::vector<uint32_t> steps;  // that each group has taken
    uint32_t first_param;         // the index of the first parameter of the groups
    std::vector<Shard> shards;    // in the order of their parameters
  };

  struct Options {
    double grad_scale = 1;   // divides the gradients where they are read
    double coefficient = 1;  // multiplies the quotients
    Scaler scaler;
    std::optional<Clipping> clipping;
    std::optional<std::vector<Run>> created;  // parameters whose state Python has created: they take their first step
    std::vector<Index> stepped;               // parameters that torch has stepped, which are passed over
    bool zeroes = false;                      // sets the gradients to zero in the update, if all allow this
    std::optional<AtRandom> at_random;        // rounds streams at random
    bool only_looks = false;                  // changes nothing and returns what must be done, even if that is nothing
  };

  // Steps every parameter that has a gradient and returns None. If Python must do something first, changes nothing and
  // returns a tuple, which todo.h describes. Python then does this and calls again with `created` and `stepped`. If the
  // host must read `scaler` first, or find the norm of the gradients, Python calls again with a `grad_scale`, or makes
  // no step. Bad input raises before anything changes.
  //
  // Containers other than exact lists and dicts (for `state` also defaultdict, for decay rates also tuples) may have
  // methods of their own, and so may numbers, flags and keys that are no strings. The plan calls none of these methods,
  // because other code must not run while borrowed references are kept. It changes nothing and returns NotImplemented.
  pybind11::object step(pybind11::handle param_groups, pybind11::handle state, Options options);

  // Returns how many parameters the last call updated, by the device's type and the backend's name.
  const std::map<Runner::Where, size_t>& updated() const { return runner_.updated(); }
  // Says whether the last call was a step that left all gradients zero.
  bool zeroed() const { return zeroed_; }
  // Returns the number of launches of the last call.
  size_t launches() const { return runner_.launches(); }

 private:
  void examine_all(bool inference_mode);
  void classify(std::vector<Index>& stepped);
  void set_aside_all(const char* reason);
  void round_at_random(const AtRandom& at_random);
  void number_shard(Tensor local, const Shard& shard, Rounding& rounding);
  bool host_decides(const Scaler& scaler, bool finds_overflow) const;
  bool may_zero(bool inference_mode);
  bool norm_is_elsewhere(const Clipping& clipping, const Scaler& scaler) const;

  const std::string optimizer_;
  const Backends backends_;
  Inventory inventory_;
  PythonReader reader_;
  LocalTensors local_tensors_;
  SharedMemorySearch search_;
  Updates updates_;
  Runner runner_;
  bool zeroed_ = false;
  uint64_t counted_ = 0;  // the version of the inventory of which its tally is; 0 if there is none
  std::vector<std::pair<const void*, int64_t>> apart_;  // addresses and bytes of gradients that shared no memory
  int running_in_ = kNoProcess;  // the process, counted by cpu::forks(), in which a step is running
  static constexpr int kNoProcess = -1;
};

}  // namespace dracopt
