// One optimizer step: reads what Python holds now, refuses what is wrong, and updates the rest.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/key_reader.h"
#include "bindings/launches.h"
#include "bindings/overlap.h"
#include "core/rule_entry.h"

namespace dracopt {

// Belongs to one optimizer. It keeps no tensor and trusts nothing from the step before: every step reads the parameter
// groups, gradients and states anew, so whatever a user did to them in between holds. Only the result of the search for
// shared memory is kept, for as long as the addresses are the same, and what lies on a GPU already.
class StepPlan {
 public:
  // `optimizer` is the name of the class, for errors.
  StepPlan(const std::string& rule, std::string optimizer);

  using Index = std::pair<int, int>;  // of a group, and of a parameter in it
  using Indices = std::vector<Index>;
  using Run = std::tuple<int, int, int>;  // the index of a group, that of a parameter in it, and that after the last
  using Runs = std::vector<Run>;

  // Steps every parameter that has a gradient and returns None. If there is something for Python to do first, changes
  // nothing and returns (missing, foreign, host_decides, all_foreign): runs of parameters whose state is yet to be
  // created; those that the native kernels do not serve, each with the reason and its form, as
  // dracopt_ext/foreign.py has it; whether `scaler` must be read by the host after all, for which there is then a
  // `grad_scale`, or no step; and whether nothing is left for the plan. Python does it and calls again: the parameters
  // in `created` then take their first step, and those in `stepped` are passed over. Gradients are divided by
  // `grad_scale` where they are read. Bad input raises, and nothing has changed.
  //
  // Containers other than exact lists and dicts (for `state` also defaultdict, for decay rates also tuples) may answer
  // by methods of their own, which this does not call. It then changes nothing and returns NotImplemented.
  //
  // Other code must not run while borrowed references are kept. So numbers and flags that have methods of their own,
  // and keys that are no strings, are left to Python in this way, too.
  pybind11::object step(pybind11::handle param_groups, pybind11::handle state, double grad_scale, const Scaler& scaler,
                        std::optional<Runs> created, Indices stepped);

  // How many parameters the last call updated, by type of device.
  std::map<std::string, size_t> updated() const { return updated_; }
  // The launches of the last call.
  size_t launches() const;

 private:
  struct Group {
    PyObject* dict;
    PyObject* params;
    int index;
    int states;
    bool maximize, fused, capturable;
    const char* foreign;  // why torch is to step the whole group; null if it is not
    double hyperparameters[kMaxHyperparameters];
    bool reads_memory;                           // some hyperparameter is a tensor
    uint8_t bytes[kMaxHyperparameters];          // of the k-th, if that is a tensor; else 0
    const void* addresses[kMaxHyperparameters];  // which outlive a step, as those of streams do
    std::optional<c10::Device> gpu;              // of hyperparameters that the kernel reads
    uint16_t fp32_address, fp64_address;         // bit k: the kernel reads the k-th in that dtype
  };

  // A parameter that has a gradient, and what was found of its state; all borrowed, null where absent.
  struct Located {
    uint32_t group, index : 31;
    bool has_state : 1;  // which is not empty
    PyObject* parameter;
    c10::TensorImpl* grad;
    PyObject* values[kMaxStateKeys];  // by state_keys_

    c10::TensorImpl* param() const;
  };

  enum class Verdict : uint8_t { ready, missing_state, foreign, expanded, partial_state, wrong };

  // How a gradient or a state cannot belong to its parameter.
  enum class Fault : uint8_t { none, no_tensor, device, shape, dtype, expanded, memory };
  static constexpr int kGradient = -1, kParameter = -2;  // in the place of a state

  // An Examined says what a located parameter's tensors turned out to be. Addresses outlive a step: the next one
  // compares its own with those that it finds at the same place.
  struct Examined {
    const char* reason;  // of what is foreign
    // of what is ready
    void* carried_data[kMaxCarried];
    bool carried_fp32[kMaxCarried], carried_on_gpu[kMaxCarried];
    uint32_t prepared;
    // of what is ready, or of what is missing its state, which has no states
    uint32_t located;
    Arithmetic arithmetic;
    bool strided, written_moved, grad_moved;
    bool on_gpu, has_recipe;  // with a recipe the kernel prepares the scalars
    bool first;               // the streams of the state hold nothing yet, and nothing carried tells
    uint8_t stream_count;
    Verdict verdict;
    // of what is wrong; in state_keys_, kGradient or kParameter; of what is partial, too
    Fault fault;
    int8_t culprit;

    void be_foreign(const char* why) {
      verdict = Verdict::foreign;
      reason = why;
    }
    void be_wrong(Fault what, int where) {
      verdict = Verdict::wrong;
      fault = what;
      culprit = static_cast<int8_t>(where);
    }
  };

  // A Prepared holds the scalars that the rule made of a group's hyperparameters and of carried scalars, for all
  // parameters that have the same.
  struct Prepared {
    Scalars scalars;
    Carried carried[kMaxCarried];  // after this step
    Update update;
  };

  struct Foreign {
    size_t located;
    const char* reason;
  };

  // The functions that read return false for what Python must read.
  bool read_groups(PyObject* param_groups);
  bool read_group(PyObject* dict, Group& group);
  bool read_number(Group& group, PyObject* key, PyObject* number, bool is_decay_rate, int& count);
  bool locate(PyObject* state);
  void examine();
  void examine(const Located& located, Examined& examined, Segment& segment) const;
  bool examine_state(const Located& located, Examined& examined) const;
  static Fault fault_of(const c10::TensorImpl* tensor, const c10::TensorImpl* param);
  static Fault fault_of_scalar(const c10::TensorImpl* tensor, const c10::TensorImpl* param);
  void make_segment(const Located& located, Examined& examined, Segment& segment) const;
  void read_carried(const Examined& examined, Carried* carried) const;
  void prepare(const Runs& created);
  void settle(const Indices& stepped);
  void lay_out(const Examined& examined, Segment& segment);
  std::string describe_fault(const Examined& examined) const;
  [[noreturn]] void refuse(const Examined& examined) const;
  [[noreturn]] void refuse_scalars(const Examined& examined) const;
  bool set_aside_overlapping();
  void set_aside_all(const char* reason);
  void set_aside_missing();
  void keep(size_t from, size_t to);  // among the examined and their segments
  void check_capture() const;
  bool host_decides(const Scaler& scaler) const;
  void run(const Scaler& scaler);
  void run_on_gpus(const Scaler& scaler);
  void run_on_cpu(bool holds_gil);
  Launches& launches_for(const Examined& examined);
  size_t fill_slot(const Examined& examined, uint64_t* words) const;
  void record(const Examined& examined) const;
  int form_of(const Foreign& foreign) const;
  bool is_fusable(const Located& located) const;
  pybind11::object todo(bool host_decides) const;

  int wanted_states(const Group& group) const { return rule_.carried + group.states; }
  const Group& group_of(const Located& located) const { return groups_[located.group]; }
  const Group& group_of(const Examined& examined) const { return group_of(located_[examined.located]); }
  static Index index_of(const Located& located) { return {located.group, located.index}; }
  c10::TensorImpl* tensor_of(const Located& located, int stream) const;
  c10::TensorImpl* carrier_of(const Located& located, int k) const;
  const c10::TensorImpl* param_of(const Examined& examined) const { return located_[examined.located].param(); }
  std::string describe(const Located& located) const;
  int64_t bytes_of(size_t i, int stream) const;

  const RuleEntry& rule_;
  const std::string optimizer_;
  const pybind11::object defaultdict_;
  KeyReader group_keys_, state_keys_;

  std::vector<Group> groups_;
  std::vector<Located> located_;
  std::vector<Examined> examined_;
  std::vector<Segment> segments_;  // one for each examined; those beyond count_ are from an earlier step
  std::deque<Prepared> prepared_;  // those beyond prepared_count_ are from an earlier step
  size_t prepared_count_ = 0;
  std::deque<Layout> layouts_;
  size_t count_ = 0;
  double grad_scale_ = 1;
  bool inference_mode_ = false;
  Runs missing_;
  bool missing_is_hosts_ = false;  // some of these will not be stepped by kernels on a GPU alone
  std::vector<Foreign> foreign_;

  WrittenMemory memory_;
  std::vector<size_t> overlapping_;
  // Nothing overlaps, as long as the addresses in segments_ and groups_ do not move. False until a step is planned, so
  // that one which ends early leaves nothing behind that could be wrong.
  bool searched_ = false;
  size_t searched_count_ = 0;
  bool written_moved_ = true, reads_moved_ = true;  // since that search

  std::deque<Launches> launches_;

  std::map<std::string, size_t> updated_;
  int running_in_ = kNoProcess;  // the process, counted by cpu::forks(), in which a step is running
  static constexpr int kNoProcess = -1;
};

}  // namespace dracopt
