// Finds tensors of one step that share memory where it is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dracopt {

// The memory that a step writes, by address, with the index of the segment that writes it.
class WrittenMemory {
 public:
  void clear() { ranges_.clear(); }
  void add(size_t owner, const void* data, int64_t bytes);
  void sort();

  // Once sorted: appends the owners of ranges that overlap each other.
  void append_overlapping(std::vector<size_t>& owners) const;
  // Once sorted: appends `reader` and the owners of all written memory that overlaps what it reads.
  void append_overlapping(size_t reader, const void* data, int64_t bytes, std::vector<size_t>& owners) const;

 private:
  struct Range {
    uintptr_t begin, end;
    size_t owner;
    uintptr_t reach;  // the furthest end of this range and those before it
  };
  std::vector<Range> ranges_;
};

}  // namespace dracopt
