#include "bindings/shared_memory.h"

#include "bindings/examine.h"

namespace dracopt {
namespace {

// The parts of an owner are its streams and, from this number on, the scalars of its state.
constexpr int kFirstScalar = kMaxStreams;
static_assert(kMaxStreams + kMaxStateScalars <= WrittenMemory::kMaxParts);

// Calls `body(address, bytes)` with the memory over which a tensor extends, if the tensor is plain.
template <typename Body>
void with_memory_of(Tensor tensor, const Body& body) {
  if (is_plain(tensor)) body(data_of(tensor), extent_of(tensor) * tensor.itemsize());
}

}  // namespace

void SharedMemorySearch::compare(const Examined& before, const Segment& segment_before, const Examined& now,
                                 const Segment& segment_now) {
  const Streams *const streams_before = streams_of(before), *const streams = streams_of(now);
  if (before.index() != now.index()) written_moved_.store(true, std::memory_order_relaxed);
  if (before.index() != now.index() || streams == nullptr) return;
  // The extent of a tensor with gaps is not remembered.
  bool written =
      streams_before->count != streams->count || streams->has_gaps || segment_before.numel != segment_now.numel;
  for (int k = 0; k < streams->count && !written; ++k) {
    const bool moved =
        segment_before.data[k] != segment_now.data[k] || segment_before.dtypes[k] != segment_now.dtypes[k];
    if (moved && k == kGrad) reads_moved_.store(true, std::memory_order_relaxed);
    written = moved && k != kGrad;
  }
  if (const auto *was = std::get_if<Ready>(&before), *is = std::get_if<Ready>(&now); !written && is != nullptr) {
    for (int k = 0; k < kMaxStateScalars; ++k) {
      written |= was->scalar_data[k] != is->scalar_data[k] || was->scalar_fp32[k] != is->scalar_fp32[k];
    }
  }
  if (written) written_moved_.store(true, std::memory_order_relaxed);
}

// Compares hyperparameters that are tensors, because a learning rate may lie in memory that the step writes.
bool SharedMemorySearch::hyperparameters_moved(const Inventory& inventory) {
  size_t count = 0;
  bool moved = false;
  for (const Group& group : inventory.groups) {
    for (int k = 0; group.reads_memory && k < inventory.rule.hyperparameters; ++k) {
      if (group.bytes[k] == 0) continue;
      const std::pair<const void*, int> found{group.addresses[k], group.bytes[k]};
      if (count == hyperparameters_.size()) hyperparameters_.emplace_back();
      moved |= std::exchange(hyperparameters_[count++], found) != found;
    }
  }
  hyperparameters_.resize(count);
  return moved;
}

bool SharedMemorySearch::set_aside(Inventory& inventory, bool all_updated) {
  bool complete = true;
  for (size_t i = 0; i < inventory.size() && complete && !all_updated; ++i) {
    complete = streams_of(inventory.examined[i]) != nullptr || !inventory.located[i].grad.is_defined();
  }
  // The memory of unsupported parameters is not compared with that of the step before.
  if (!complete || inventory.size() != searched_) written_moved_ = true;
  if (hyperparameters_moved(inventory)) reads_moved_ = true;
  overlapping_.clear();
  if (written_moved_ || reads_moved_) {
    find_overlapping(inventory);
    std::vector<bool> overlaps;
    if (!overlapping_.empty()) overlaps.resize(inventory.size() + inventory.groups.size());
    for (size_t owner : overlapping_) overlaps[owner] = true;
    for (size_t i = 0; i < inventory.size() && !overlapping_.empty(); ++i) {
      if (streams_of(inventory.examined[i]) == nullptr) continue;
      if (overlaps[i] || overlaps[inventory.size() + inventory.located[i].group]) {
        inventory.examined[i] = Unsupported{kSharesMemory};
      }
    }
    complete &= overlapping_.empty();
  }
  searched_ = inventory.size();
  nothing_overlapped_ = complete;
  return !overlapping_.empty();
}

void SharedMemorySearch::sort_written_memory(const Inventory& inventory) {
  size_t pieces = 0;
  for (size_t i = 0; i < inventory.size(); ++i) {
    const Streams* const streams = streams_of(inventory.examined[i]);
    pieces += streams == nullptr ? 1 : static_cast<size_t>(streams->count - 1 + inventory.rule.state_scalars);
  }
  memory_.clear();
  memory_.reserve(pieces);
  for (size_t i = 0; i < inventory.size(); ++i) {
    const Segment& segment = inventory.segments[i];
    if (const Streams* const streams = streams_of(inventory.examined[i])) {
      for (int k = 0; k < streams->count && segment.numel > 0; ++k) {
        if (k != kGrad) memory_.add(i, k, segment.data[k]);
      }
    }
    if (const auto* ready = std::get_if<Ready>(&inventory.examined[i])) {
      for (int k = 0; k < inventory.rule.state_scalars; ++k) memory_.add(i, kFirstScalar + k, ready->scalar_data[k]);
    }
    if (std::holds_alternative<Unsupported>(inventory.examined[i])) {
      with_memory_of(inventory.located[i].param(), [&](const void* data, int64_t bytes) {
        if (bytes > 0) memory_.add(i, kParam, data);
      });
    }
  }
  memory_.sort();
}

// Appends the owners of memory that overlaps to overlapping_.
void SharedMemorySearch::find_overlapping(const Inventory& inventory) {
  const auto end_of = [&](const WrittenMemory::Piece& piece) {
    const Examined& examined = inventory.examined[piece.owner];
    const int part = static_cast<int>(piece.part);
    int64_t bytes = 0;
    if (streams_of(examined) == nullptr) {
      with_memory_of(inventory.located[piece.owner].param(), [&](const void*, int64_t of_it) { bytes = of_it; });
    } else if (part < kFirstScalar) {
      bytes = inventory.bytes_of(piece.owner, part);
    } else {
      bytes = std::get<Ready>(examined).scalar_fp32[part - kFirstScalar] ? 4 : 8;
    }
    return piece.begin + static_cast<uintptr_t>(bytes);
  };
  const auto read = [&](size_t reader, const void* data, int64_t bytes) {
    memory_.append_overlapping(reader, data, bytes, end_of, overlapping_);
  };
  if (written_moved_) {
    sort_written_memory(inventory);
    memory_.append_overlapping(end_of, overlapping_);
  }
  for (size_t i = 0; i < inventory.size(); ++i) {
    if (streams_of(inventory.examined[i]) != nullptr) {
      read(i, inventory.segments[i].data[kGrad], inventory.bytes_of(i, kGrad));
    } else if (std::holds_alternative<Unsupported>(inventory.examined[i])) {
      with_memory_of(inventory.located[i].grad, [&](auto... range) { read(i, range...); });
    }
  }
  // In torch, later groups see the new value of a hyperparameter that is updated like a parameter.
  for (const Group& group : inventory.groups) {
    for (int k = 0; group.reads_memory && k < inventory.rule.hyperparameters; ++k) {
      read(inventory.size() + static_cast<size_t>(group.index), group.addresses[k], group.bytes[k]);
    }
  }
}

}  // namespace dracopt
