// Tiles are the pieces of a stream that the update loop works on, short enough for the first-level cache. A tile whose
// elements are neighbours, in the arithmetic's own dtype, is updated in place. Any other tile is staged.
#pragma once

#include "core/segment.h"
#include "cpu/runs.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

template <typename T>
constexpr int64_t kTile = 1024 / sizeof(T);  // elements

inline bool all_dense(const Segment& segment, int streams, Dtype dtype) {
  for (int k = 0; k < streams; ++k) {
    if (!segment.dense[k] || segment.dtypes[k] != dtype) return false;
  }
  return true;
}

// Calls `body(offset, stride, n)` for runs of n elements that lie `stride` apart. Together the runs are the `count`
// elements from number `from` on.
template <typename Body>
DRACOPT_HD void for_each_run(const Layout& layout, int stream, int64_t from, int64_t count, const Body& body) {
  const int64_t* const strides = layout.strides[stream];
  const int inner = layout.dims - 1;
  int64_t index[kMaxDims], offset = 0;
  for (int d = inner; d >= 0; --d) {
    index[d] = from % layout.sizes[d];
    from /= layout.sizes[d];
    offset += index[d] * strides[d];
  }
  while (count > 0) {
    int64_t n = layout.sizes[inner] - index[inner];
    if (n > count) n = count;
    body(offset, strides[inner], n);
    count -= n;
    index[inner] += n;
    offset += n * strides[inner];
    for (int d = inner; d > 0 && index[d] == layout.sizes[d]; --d) {
      offset += strides[d - 1] - index[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <typename T, typename Stored>
void gather(const Stored* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    widen_run(from, count, to);
  } else if (stride == 0) {
    const T number = static_cast<T>(widen(*from));
    for (int64_t i = 0; i < count; ++i) to[i] = number;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
  }
}

template <typename T, typename Stored>
void scatter(const T* from, int64_t count, Stored* to, int64_t stride) {
  if (stride == 1) {
    narrow_run(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = narrow<Stored>(from[i]);
  }
}

// Returns the `count` elements from number `from` on as a copy in `staged`, or in place if they are neighbours.
template <typename T>
DRACOPT_APART T* stage(const Segment& segment, int stream, int64_t from, int64_t count, T* staged) {
  T* found = staged;
  as_stored(segment.data[stream], segment.dtypes[stream], [&](auto* data) {
    if (segment.dense[stream]) return gather(data + from, 1, count, staged);
    for_each_run(*segment.layout, stream, from, count, [&](int64_t offset, int64_t stride, int64_t n) {
      if constexpr (std::is_same_v<decltype(data), T*>) {
        if (n == count && stride == 1) {
          found = data + offset;
          return;
        }
      }
      gather(data + offset, stride, n, staged);
      staged += n;
    });
  });
  return found;
}

// Returns the `count` elements from number `from` on, in place or as a copy in `staged`.
template <typename T>
DRACOPT_HD T* load(const Segment& segment, int stream, int64_t from, int64_t count, T* staged) {
  if (segment.dense[stream] && segment.dtypes[stream] == dtype_of<T>) {
    return static_cast<T*>(segment.data[stream]) + from;
  }
  return stage(segment, stream, from, count, staged);
}

// Writes the staged elements back.
template <typename T>
DRACOPT_APART void store(const Segment& segment, int stream, int64_t from, int64_t count, const T* staged) {
  as_stored(segment.data[stream], segment.dtypes[stream], [&](auto* data) {
    if (segment.dense[stream]) return scatter(staged, count, data + from, 1);
    for_each_run(*segment.layout, stream, from, count, [&](int64_t offset, int64_t stride, int64_t n) {
      scatter(staged, n, data + offset, stride);
      staged += n;
    });
  });
}

// Sets the `count` elements from number `from` on to zero.
template <typename T>
DRACOPT_APART void clear(const Segment& segment, int stream, int64_t from, int64_t count) {
  if (segment.dense[stream]) {
    const int64_t bytes = itemsize(segment.dtypes[stream]);
    __builtin_memset(static_cast<char*>(segment.data[stream]) + from * bytes, 0, static_cast<size_t>(count * bytes));
  } else {
    alignas(64) const T zeros[kTile<T>] = {};
    store(segment, stream, from, count, zeros);
  }
}

// Returns the gradient's tile, divided in `staged` where the loop's factor does not suffice.
template <typename T>
T* divided(const Update& update, T* tile, int64_t count, T* staged) {
  if (!update.divides) return tile;
  const T by = static_cast<T>(update.grad_scale);
  DRACOPT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) staged[i] = tile[i] / by;
  return staged;
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
