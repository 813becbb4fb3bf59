#include "bindings/triton_launches.h"

#include <cstring>
#include <limits>

namespace py = pybind11;

namespace dracopt {
namespace {

// The forms of a launch hold dtypes, two bits each, then the form of masters, a bit for a parameter that is rounded at
// random, one for states, and the number of states.
constexpr int kMasterBits = 2 * (kFirstState + kMaxStates), kParamAtRandom = kMasterBits + 2;
constexpr int kStatesAtRandom = kParamAtRandom + 1, kStateCount = kStatesAtRandom + 1;
static_assert(kMaxStates < 4 && kStateCount + 2 <= 16);

py::tuple names_of(uint16_t forms) {
  constexpr const char* names[] = {"fp32", "fp64", "bf16", "fp16"};  // in the order of Dtype
  py::tuple found(static_cast<size_t>(kFirstState + (forms >> kStateCount)));
  for (size_t k = 0; k < found.size(); ++k) found[k] = names[forms >> 2 * k & 3];
  return found;
}

py::object make_launcher(const LaunchKey& key, const RuleEntry& rule, const Triton& triton) {
  const DeviceGuard guard(key.device);
  constexpr const char* masters[] = {nullptr, "fp32", "split16"};  // in the order of Master
  const int at_random = key.forms >> kParamAtRandom & 3;
  return triton.make_launcher(rule.name, names_of(key.forms), key.device.name(), masters[key.forms >> kMasterBits & 3],
                              at_random);
}

}  // namespace

uint16_t forms_for_triton(const Segment& segment, int states) {
  uint32_t forms = static_cast<uint32_t>(segment.master) << kMasterBits | static_cast<uint32_t>(states) << kStateCount;
  for (int k = 0; k < kFirstState + states; ++k) forms |= cuda::dtype_at(k, segment.dtypes[k]);
  const uint32_t at_random = segment.rounding == nullptr ? 0 : segment.rounding->streams;
  forms |= (at_random >> kParam & 1) << kParamAtRandom;
  forms |= static_cast<uint32_t>(at_random >> kFirstState != 0) << kStatesAtRandom;
  return static_cast<uint16_t>(forms);
}

TritonLaunches::TritonLaunches(LaunchKey key, const RuleEntry& rule, const Triton& triton)
    : GpuLaunches(key, {.tile = triton.tile, .room = std::numeric_limits<uint32_t>::max()}),
      launcher_(make_launcher(key, rule, triton)) {}

void TritonLaunches::begin() {
  GpuLaunches::begin();
  sent_.clear();  // a step that failed may have left some
}

void TritonLaunches::copy_to_device(Memory& to, Memory& from) {
  to.copy_from(from);
  if (is_capturing()) keep(std::move(from));  // the graph makes the copy at every replay
}

void TritonLaunches::write_table(Memory& table, const std::vector<char>& image) {
  Memory source = Memory::on_host(image.size(), key().device);
  std::memcpy(source.data(), image.data(), image.size());
  copy_to_device(table, source);
}

// Brings the arguments of a launch to the device.
Memory TritonLaunches::send(const Launch& launch, const cuda::Arguments& arguments) {
  const size_t of_gradients = launch.gradients.size() * sizeof(uint64_t);
  const size_t of_slots = launch.slots.size() * sizeof(uint64_t);
  const size_t size = cuda::kHeaderBytes + of_gradients + of_slots;
  Memory source = Memory::on_host(size, key().device), there(size, key().device);
  std::memcpy(source.data(), &arguments, cuda::kHeaderBytes);
  std::memcpy(source.data() + cuda::kHeaderBytes, launch.gradients.data(), of_gradients);
  std::memcpy(source.data() + cuda::kHeaderBytes + of_gradients, launch.slots.data(), of_slots);
  copy_to_device(there, source);
  return there;
}

void TritonLaunches::call(const char* launcher, const cuda::Arguments& arguments, Memory& sent) {
  const auto number = [](const void* address) { return reinterpret_cast<uintptr_t>(address); };
  launcher_.attr(launcher)(arguments.blocks, number(arguments.rows), number(arguments.layouts),
                           number(arguments.first_tiles), number(sent.data()), is_capturing());
}

void TritonLaunches::run_measure(const Launch& launch, cuda::Arguments& arguments) {
  Memory& sent = sent_[&launch] = send(launch, arguments);
  call("measure", arguments, sent);
}

void TritonLaunches::run(const Launch& launch, cuda::Arguments& arguments) {
  auto node = sent_.extract(&launch);
  Memory sent = node.empty() ? send(launch, arguments) : std::move(node.mapped());
  call("update", arguments, sent);
  if (is_capturing()) keep(std::move(sent));
}

}  // namespace dracopt
