// Says which kernels update the tensors of a device.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/tensor.h"

namespace dracopt {

enum class Backend : uint8_t { cpu, cuda, triton };
constexpr int kBackends = 3;

inline const char* name_of(Backend backend) { return backend == Backend::triton ? "triton" : "native"; }

// Describes the Triton kernels to a plan. Python launches them: see triton_kernels/launcher.py.
struct Triton {
  pybind11::object make_launcher;       // called with a rule's name, the dtypes and a device; returns a launcher
  pybind11::object is_capturing;        // says whether a graph is being captured from the current stream, or is None
  int64_t tile;                         // elements that a program updates
  bool on_cpu;                          // the kernels also serve the CPU, because they run in the interpreter
  std::vector<const char*> no_kernels;  // by the GPU's index: why it cannot run the kernels, or null
};

class Backends {
 public:
  // `cpu` and `cuda` say whether these kernels may be used, and `triton` is missing if Triton may not.
  Backends(bool cpu, bool cuda, std::optional<Triton> triton) : cpu_(cpu), cuda_(cuda), triton_(std::move(triton)) {}

  struct Found {
    Backend backend;
    const char* why_not;  // null if the backend serves the device; lives as long as the process
  };

  // Finds the backend for tensors of a device: the compiled kernels if they can run there, otherwise Triton's.
  Found for_device(Device device) const;

  // Says whether a graph is being captured from the current stream of a GPU that this backend serves.
  bool is_capturing(Device device, Backend backend) const;

  // Must have been given.
  const Triton& triton() const { return *triton_; }

 private:
  bool cpu_, cuda_;
  std::optional<Triton> triton_;
};

// Returns a copy of a text that lives as long as the process.
const char* lasting(const std::string& text);

}  // namespace dracopt
