// A launch of the update kernel made by hand, without torch, and the results that the kernel must compute.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/math.h"
#include "cuda/kernels.h"
#include "memory.h"

namespace dracopt {

// A Problem holds the table and the arguments of a launch.
class Problem {
 public:
  // Adds a slot and returns its place. The words are the scalars, or the recipe, of every tensor that uses the slot.
  uint32_t add_slot(const void* words, size_t bytes) {
    slot_words_ += (bytes + 7) / 8;
    const size_t at = cuda::kArgumentWords - slot_words_;
    std::memcpy(arguments.words + at, words, bytes);
    return static_cast<uint32_t>(at);
  }

  void add(const cuda::Row& row, const void* gradient) {
    arguments.words[rows_.size()] = reinterpret_cast<uint64_t>(gradient);
    rows_.push_back(row);
  }

  // Copies the table to the device for blocks of `tile` elements each.
  void upload(int64_t tile, bool counts_on_device) {
    std::vector<uint32_t> first_tiles;
    arguments.blocks = 0;
    for (const cuda::Row& row : rows_) {
      first_tiles.push_back(arguments.blocks);
      arguments.blocks += static_cast<uint32_t>(std::max<int64_t>(1, (row.numel + tile - 1) / tile));
    }
    const size_t bytes = rows_.size() * sizeof(cuda::Row), more = first_tiles.size() * sizeof(uint32_t);
    if (table_ == nullptr) table_ = static_cast<char*>(memory::allocate(bytes + more + sizeof(uint32_t)));
    memory::copy(table_, rows_.data(), bytes);
    memory::copy(table_ + bytes, first_tiles.data(), more);
    const uint32_t none_yet = 0;
    memory::copy(table_ + bytes + more, &none_yet, sizeof(none_yet));
    arguments.rows = reinterpret_cast<const cuda::Row*>(table_);
    arguments.first_tiles = reinterpret_cast<const uint32_t*>(table_ + bytes);
    arguments.finished = counts_on_device ? reinterpret_cast<uint32_t*>(table_ + bytes + more) : nullptr;
    arguments.count = static_cast<uint32_t>(rows_.size());
  }

  ~Problem() {
    if (table_ != nullptr) memory::release(table_);
  }

  cuda::Arguments arguments{.divisor = 1, .coefficient = 1};

 private:
  std::vector<cuda::Row> rows_;
  size_t slot_words_ = 0;
  char* table_ = nullptr;
};

// OnHost describes dense streams in the host's memory.
struct OnHost {
  char* data[kMaxStreams];
  Dtype dtypes[kMaxStreams];
};

// Applies the rule to all elements, one after the other, without the kernel's code except the conversions of numbers.
template <typename Rule, typename T, int N>
void update_each(const typename Rule::template Scalars<T>& scalars, const OnHost& streams, int64_t numel, T divisor) {
  for (int64_t i = 0; i < numel; ++i) {
    T x[kFirstState + N];
    for (int k = 0; k < kFirstState + N; ++k) {
      as_stored(static_cast<const void*>(streams.data[k]), streams.dtypes[k],
                [&](auto* from) { x[k] = static_cast<T>(widen(from[i])); });
    }
    if (divisor != T(1)) x[kGrad] = x[kGrad] / divisor;
    PlainMath math;
    Rule::template update<T, N>(scalars, x[kParam], x[kGrad], x + kFirstState, math);
    for (int k = 0; k < kFirstState + N; ++k) {
      if (k == kGrad) continue;
      as_stored(static_cast<void*>(streams.data[k]), streams.dtypes[k],
                [&](auto* to) { to[i] = narrow<std::decay_t<decltype(*to)>>(x[k]); });
    }
  }
}

}  // namespace dracopt
