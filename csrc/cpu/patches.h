// Patches serve tensors of which one lies in memory in another order than the rest. A cache line of that tensor holds
// one element of each of many rows of the others. A patch is a rectangle that uses all of the line while it is cached.
#pragma once

#include <type_traits>

#include "core/prefetch.h"
#include "cpu/tiles.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

// Returns the dimension that runs from row to row in the patches of a segment: the one in which a stream has its
// neighbours. Returns the last dimension if patches do not pay: there is no such stream, the elements of its rows share
// cache lines, or there are too few of them.
inline int find_row_dim(const Segment& segment, int streams) {
  constexpr int64_t line = 64, enough = 256;
  const Layout& layout = *segment.layout;
  const int last = layout.dims - 1;
  for (int k = 0; k < streams; ++k) {
    const int64_t* const strides = layout.strides[k];
    int nearest = last;
    for (int d = last - 1; d >= 0; --d) {
      if (strides[d] != 0 && strides[d] < strides[nearest]) nearest = d;
    }
    if (nearest == last || strides[last] < line / itemsize(segment.dtypes[k])) continue;
    if (layout.sizes[nearest] >= enough || layout.sizes[nearest] * layout.sizes[last] >= enough) return nearest;
  }
  return last;
}

// A rectangle of elements. The layout's last dimension runs along a row, and another one from row to row.
struct Patch {
  int64_t rows, columns;
  int64_t offsets[kMaxStreams];  // of the first element
};

// Cuts a segment into patches.
template <typename T>
class Patches {
 public:
  // The most elements: 72 rows of 64 in fp32, or 9 rows of 512. Copies of a few streams fit into a core's caches.
  static constexpr int64_t kMost = 18432 / sizeof(T);
  static constexpr int64_t kLongRow = 64;  // elements

  Patches(const Segment& segment, int streams, int row_dim)
      : layout_(*segment.layout), streams_(streams), row_dim_(row_dim) {
    const int64_t width = size(last()), height = size(row_dim);
    columns_ = width < kLongRow ? width : kLongRow;
    rows_ = kMost / columns_ < height ? kMost / columns_ : height;
    if (width > kLongRow) {
      const int64_t cuts = parts(width, kMost / rows_ / kLongRow * kLongRow);  // few rows are longer
      columns_ = parts(width, cuts);                                           // about alike
    }
    count_ = segment.numel / width / height * parts(width, columns_) * parts(height, rows_);
    average_ = segment.numel / count_;
  }

  // Returns the number of the first patch of a range that begins with this element, or the number of all patches. So
  // ranges share the patches as they share the elements, about.
  int64_t first_from(int64_t element) const {
    const int64_t number = element / average_ + (element % average_ != 0);
    return number < count_ ? number : count_;
  }

  Patch at(int64_t number) const {
    Patch patch{};
    const auto take = [&](int d, int64_t most) {
      const int64_t count = parts(size(d), most), begin = number % count * most;
      number /= count;
      for (int k = 0; k < streams_; ++k) patch.offsets[k] += begin * layout_.strides[k][d];
      return size(d) - begin < most ? size(d) - begin : most;
    };
    patch.columns = take(last(), columns_);
    patch.rows = take(row_dim_, rows_);
    for (int d = last() - 1; d >= 0; --d) {
      if (d != row_dim_) take(d, 1);
    }
    return patch;
  }

  int64_t row_stride(int stream) const { return layout_.strides[stream][row_dim_]; }
  int64_t column_stride(int stream) const { return layout_.strides[stream][last()]; }

 private:
  static int64_t parts(int64_t size, int64_t most) { return size / most + (size % most != 0); }
  int64_t size(int d) const { return layout_.sizes[d]; }
  int last() const { return layout_.dims - 1; }

  const Layout& layout_;
  const int streams_, row_dim_;
  int64_t rows_, columns_, count_, average_;
};

// Fetches a run of neighbours that later patches use. The processor does not foresee it.
template <typename Stored>
DRACOPT_INLINE void prefetch_run(const Stored* first, int64_t stride, int64_t count) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(Stored));
  for (int64_t i = 0; i < count && stride == 1; i += line) prefetch(first + i);
}

constexpr int kPatchesAhead = 2, kColumnsAhead = 32;

// The runs of a stream's patch, of one length. The elements of a patch are numbered row by row.
struct Runs {
  int64_t length;
  int64_t stride, step;         // from an element to the next one, in memory and in numbers
  int64_t count;                // of runs
  int64_t advance, renumbered;  // from a run to the next one, likewise
  int64_t ahead;                // from a run to another one, which is fetched
};

// A patch's columns are its runs if a column's elements are neighbours in memory, else its rows. Rows that follow one
// another are one run.
template <typename T>
Runs runs_of(const Patches<T>& patches, const Patch& patch, int stream) {
  const int64_t down = patches.row_stride(stream), right = patches.column_stride(stream);
  if (down > 0 && down < right) {
    return {patch.rows, down, patch.columns, patch.columns, right, 1, kColumnsAhead * right};
  }
  if (right == 1 && down == patch.columns) return {patch.rows * patch.columns, 1, 1, 1, 0, 0, 0};
  return {patch.columns, right, 1, patch.rows, down, patch.columns, kPatchesAhead * patch.columns};
}

// Calls `body(run, first, runs)` for each run; its first element has the number `first`.
template <typename T, typename Body>
void for_each_run_in(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream,
                     const Body& body) {
  const Runs runs = runs_of(patches, patch, stream);
  as_stored(segment.data[stream], segment.dtypes[stream], [&](auto* run) {
    run += patch.offsets[stream];
    for (int64_t i = 0; i < runs.count; ++i, run += runs.advance) {
      prefetch_run(run + runs.ahead, runs.stride, runs.length);
      body(run, i * runs.renumbered, runs);
    }
  });
}

// The rows of a stream's patch, in place or as a copy.
template <typename T>
struct Rows {
  T* first;
  int64_t pitch;  // from one row to the next
};

template <typename T>
DRACOPT_APART Rows<T> load(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream,
                           T* staged) {
  const int64_t pitch = patches.row_stride(stream);
  const bool has_rows = pitch == patch.columns || patch.columns >= Patches<T>::kLongRow / 2;
  if (segment.dtypes[stream] == dtype_of<T> && patches.column_stride(stream) == 1 && has_rows) {
    return {static_cast<T*>(segment.data[stream]) + patch.offsets[stream], pitch};
  }
  for_each_run_in(patches, patch, segment, stream, [&](const auto* run, int64_t first, const Runs& runs) {
    T* const to = staged + first;
    if (runs.step == 1) return gather(run, runs.stride, runs.length, to);
    for (int64_t i = 0; i < runs.length; ++i) to[i * runs.step] = static_cast<T>(widen(run[i * runs.stride]));
  });
  return {staged, patch.columns};
}

// Writes a copy back.
template <typename T>
DRACOPT_APART void store(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream,
                         const T* staged) {
  for_each_run_in(patches, patch, segment, stream, [&](auto* run, int64_t first, const Runs& runs) {
    using Stored = std::remove_pointer_t<decltype(run)>;
    const T* const from = staged + first;
    if (runs.step == 1) return scatter(from, runs.length, run, runs.stride);
    for (int64_t i = 0; i < runs.length; ++i) run[i * runs.stride] = narrow<Stored>(from[i * runs.step]);
  });
}

// Sets a stream's patch to zero.
template <typename T>
DRACOPT_APART void clear(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream) {
  for_each_run_in(patches, patch, segment, stream, [](auto* run, int64_t, const Runs& runs) {
    for (int64_t i = 0; i < runs.length; ++i) run[i * runs.stride] = {};
  });
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
