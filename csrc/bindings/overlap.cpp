#include "bindings/overlap.h"

#include <algorithm>

namespace dracopt {

void WrittenMemory::add(size_t owner, const void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) ranges_.push_back({begin, begin + static_cast<uintptr_t>(bytes), owner, 0});
}

void WrittenMemory::sort() {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t reach = 0;
  for (Range& range : ranges_) range.reach = reach = std::max(reach, range.end);
}

void WrittenMemory::append_overlapping(std::vector<size_t>& owners) const {
  const Range* furthest = nullptr;
  for (const Range& range : ranges_) {
    if (furthest != nullptr && range.begin < furthest->end) {
      owners.push_back(range.owner);
      owners.push_back(furthest->owner);
    }
    if (furthest == nullptr || range.end > furthest->end) furthest = &range;
  }
}

void WrittenMemory::append_overlapping(size_t reader, const void* data, int64_t bytes,
                                       std::vector<size_t>& owners) const {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  auto range = std::lower_bound(ranges_.begin(), ranges_.end(), end,
                                [](const Range& written, uintptr_t address) { return written.begin < address; });
  while (bytes > 0 && range != ranges_.begin() && (--range)->reach > begin) {
    if (range->end <= begin) continue;
    owners.push_back(reader);
    owners.push_back(range->owner);
  }
}

}  // namespace dracopt
