// Finds the parameters of a step whose tensors share memory that is written.
#pragma once

#include <atomic>
#include <utility>
#include <vector>

#include "bindings/inventory.h"
#include "bindings/written_memory.h"

namespace dracopt {

// Belongs to one optimizer. Remembers that nothing overlapped for as long as no tensor moves.
class SharedMemorySearch {
 public:
  // Announces that the parameters of a step will be examined, each at its place of the inventory.
  void begin() { written_moved_ = reads_moved_ = !std::exchange(nothing_overlapped_, false); }

  // Compares a place of the inventory, before it is overwritten, with what is found there now. Threads may call this at
  // the same time, each for other places.
  void compare(const Examined& before, const Segment& segment_before, const Examined& now, const Segment& segment_now);

  // Announces that a gradient is elsewhere than in the step before, and nothing else of its parameter.
  void note_moved_gradient() { reads_moved_.store(true, std::memory_order_relaxed); }

  // Sets aside the parameters that share memory, which makes them unsupported. Kernels update elements in parallel,
  // which is wrong for such parameters, while torch takes one tensor after the other. Parameters that share memory with
  // something else that torch steps are set aside, too, because torch goes first. Returns whether there are any.
  // `all_updated` says that kernels update all parameters that have a gradient.
  bool set_aside(Inventory& inventory, bool all_updated);

 private:
  bool hyperparameters_moved(const Inventory& inventory);
  void sort_written_memory(const Inventory& inventory);
  void find_overlapping(const Inventory& inventory);

  bool nothing_overlapped_ = false;                            // in the last step, all of which was searched
  size_t searched_ = 0;                                        // parameters in the last step
  std::atomic<bool> written_moved_{true}, reads_moved_{true};  // since the last step
  std::vector<std::pair<const void*, int>> hyperparameters_;   // addresses and bytes of those that were tensors
  WrittenMemory memory_;
  std::vector<size_t> overlapping_;  // indices of parameters; from the inventory's size on, indices of groups
};

}  // namespace dracopt
