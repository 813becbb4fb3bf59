// Patches serve tensors of which one lies in memory in another order than the rest. A cache line of that tensor holds
// one element of each of many rows of the others. A patch is a rectangle that uses all of the line while it is cached.
#pragma once

#include <type_traits>

#include "core/prefetch.h"
#include "cpu/tiles.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

// Returns the dimension in which a stream has its neighbours, if that is another than the last one. Returns the last
// dimension if there is no such stream, and then patches do not pay.
inline int find_row_dim(const Layout& layout, int streams) {
  const int last = layout.dims - 1;
  int nearest = last;
  for (int k = 0; k < streams && nearest == last; ++k) {
    const int64_t* const strides = layout.strides[k];
    for (int d = last - 1; d >= 0; --d) {
      if (strides[d] != 0 && strides[d] < strides[nearest]) nearest = d;
    }
  }
  return nearest;
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
  // The most elements: 72 rows of 64 in fp32, or all 9 rows of 512 in a 3x3 kernel. Copies fit into a core's caches.
  static constexpr int64_t kMost = 18432 / sizeof(T);
  static constexpr int64_t kLongRow = 64;  // a loop over as many is worth while

  Patches(const Segment& segment, int streams, int row_dim)
      : layout_(*segment.layout), streams_(streams), row_dim_(row_dim) {
    const int64_t width = size(last()), height = size(row_dim);
    columns_ = width < kLongRow ? width : kLongRow;
    rows_ = kMost / columns_ < height ? kMost / columns_ : height;
    // Few rows may be longer.
    const int64_t longer = kMost / rows_ / kLongRow * kLongRow;
    if (longer > columns_) columns_ = width < longer ? width : longer;
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

// Fetches a run that later patches use. The processor does not foresee it.
template <typename Stored>
DRACOPT_INLINE void prefetch_run(const Stored* first, int64_t stride, int64_t count) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(Stored));
  for (int64_t i = 0; i < count && stride <= 1; i += line) prefetch(first + i);
}

constexpr int kPatchesAhead = 2, kColumnsAhead = 32;

// Calls `body(run, stride, count, place, step)` for the rows of a stream's patch, or for its columns if a column's
// elements are neighbours in memory. The run's first element has the number `place` in the patch, and the next element
// has a number that is larger by `step`.
template <typename T, typename Body>
void for_each_run_in(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream,
                     const Body& body) {
  const int64_t down = patches.row_stride(stream), right = patches.column_stride(stream);
  as_stored(segment.data[stream], segment.dtypes[stream], [&](auto* data) {
    data += patch.offsets[stream];
    if (down > 0 && down < right) {
      for (int64_t column = 0; column < patch.columns; ++column, data += right) {
        prefetch_run(data + kColumnsAhead * right, down, patch.rows);
        body(data, down, patch.rows, column, patch.columns);
      }
    } else {
      for (int64_t row = 0; row < patch.rows; ++row, data += down) {
        prefetch_run(data + kPatchesAhead * patch.columns, right, patch.columns);
        body(data, right, patch.columns, row * patch.columns, int64_t(1));
      }
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
  const bool has_rows = pitch == patch.columns || patch.columns >= Patches<T>::kLongRow;
  if (segment.dtypes[stream] == dtype_of<T> && patches.column_stride(stream) == 1 && has_rows) {
    return {static_cast<T*>(segment.data[stream]) + patch.offsets[stream], pitch};
  }
  for_each_run_in(patches, patch, segment, stream,
                  [&](const auto* run, int64_t stride, int64_t count, int64_t place, int64_t step) {
                    if (step == 1) return gather(run, stride, count, staged + place);
                    for (int64_t i = 0; i < count; ++i)
                      staged[place + i * step] = static_cast<T>(widen(run[i * stride]));
                  });
  return {staged, patch.columns};
}

// Writes a copy back.
template <typename T>
DRACOPT_APART void store(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream,
                         const T* staged) {
  for_each_run_in(patches, patch, segment, stream,
                  [&](auto* run, int64_t stride, int64_t count, int64_t place, int64_t step) {
                    using Stored = std::remove_pointer_t<decltype(run)>;
                    if (step == 1) return scatter(staged + place, count, run, stride);
                    for (int64_t i = 0; i < count; ++i) run[i * stride] = narrow<Stored>(staged[place + i * step]);
                  });
}

// Sets a stream's patch to zero.
template <typename T>
DRACOPT_APART void clear(const Patches<T>& patches, const Patch& patch, const Segment& segment, int stream) {
  for_each_run_in(patches, patch, segment, stream, [&](auto* run, int64_t stride, int64_t count, int64_t, int64_t) {
    for (int64_t i = 0; i < count; ++i) run[i * stride] = {};
  });
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
