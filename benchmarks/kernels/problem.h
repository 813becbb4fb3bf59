// A launch of the update kernel made by hand, without torch, and the results that the kernel must compute.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/master.h"
#include "core/math.h"
#include "core/stochastic.h"
#include "cuda/kernels.h"
#include "cuda/tile.h"
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

// OnHost describes a tensor's streams in the host's memory, and how the kernel updates them.
struct OnHost {
  char* data[kMaxStreams];
  Dtype dtypes[kMaxStreams];
  const Layout* layout = nullptr;  // null if every stream is dense
  Master master = Master::none;
  const Rounding* rounding = nullptr;  // null if all streams are rounded to nearest
  double divisor = 1, coefficient = 1;

  int64_t place(int k, int64_t element) const {
    return layout == nullptr ? element : cuda::offset_of(*layout, k, element);
  }

  template <typename T>
  T load(int k, int64_t element) const {
    T x;
    as_stored(static_cast<const void*>(data[k]), dtypes[k],
              [&](auto* from) { x = static_cast<T>(widen(from[place(k, element)])); });
    return x;
  }

  template <typename T>
  void store(int k, int64_t element, T x) const {
    as_stored(static_cast<void*>(data[k]), dtypes[k], [&](auto* to) {
      using Stored = std::decay_t<decltype(*to)>;
      if constexpr (sizeof(Stored) == 2) {
        if (rounding != nullptr && (rounding->streams >> k & 1) != 0) {
          const uint32_t random = random_bits(*rounding, k, rounding->first + element);
          to[place(k, element)] = __builtin_bit_cast(Stored, round_at_random(static_cast<float>(x), random, dtypes[k]));
          return;
        }
      }
      to[place(k, element)] = narrow<Stored>(x);
    });
  }
};

// Replaces a widened parameter by its master.
template <typename T>
T master_of(const OnHost& streams, int master, int64_t element, T param) {
  if (streams.master == Master::none) return param;
  const auto p = static_cast<float>(param);
  if (streams.master == Master::fp32) {
    const auto wide = streams.load<float>(master, element);
    return streams.dtypes[kParam] == Dtype::bf16 ? current_master(p, wide, Bf16()) : current_master(p, wide, Fp16());
  }
  return join_master(p, reinterpret_cast<const uint16_t*>(streams.data[master])[streams.place(master, element)]);
}

template <typename T>
void store_master(const OnHost& streams, int master, int64_t element, T x) {
  const auto p = static_cast<float>(x);
  as_stored(static_cast<void*>(streams.data[kParam]), streams.dtypes[kParam], [&](auto* to) {
    using Stored = std::decay_t<decltype(*to)>;
    if constexpr (sizeof(Stored) == 2) to[streams.place(kParam, element)] = round_master(p, Stored());
  });
  if (streams.master == Master::fp32) return streams.store(master, element, p);
  reinterpret_cast<uint16_t*>(streams.data[master])[streams.place(master, element)] =
      static_cast<uint16_t>(split_master(p));
}

// Applies the rule to all elements, one after the other, without the kernel's code except the conversions of numbers.
template <typename Rule, typename T, int N>
void update_each(const typename Rule::template Scalars<T>& scalars, const OnHost& streams, int64_t numel) {
  constexpr int master = kFirstState + N;
  for (int64_t i = 0; i < numel; ++i) {
    T x[kFirstState + N];
    for (int k = 0; k < kFirstState + N; ++k) x[k] = streams.load<T>(k, i);
    x[kParam] = master_of(streams, master, i, x[kParam]);
    if (streams.divisor != 1) x[kGrad] = x[kGrad] / static_cast<T>(streams.divisor);
    x[kGrad] = static_cast<T>(streams.coefficient) * x[kGrad];
    PlainMath math;
    Rule::template update<T, N>(scalars, x[kParam], x[kGrad], x + kFirstState, math);
    if (streams.master == Master::none) {
      streams.store(kParam, i, x[kParam]);
    } else {
      store_master(streams, master, i, x[kParam]);
    }
    for (int k = kFirstState; k < kFirstState + N; ++k) streams.store(k, i, x[k]);
  }
}

}  // namespace dracopt
