// Finds tensors of one step that share memory where it is written.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace dracopt {

// The memory that a step writes, in pieces sorted by address. A piece does not hold its end, because a million
// parameters have four million pieces; `end_of(piece)` returns the end.
class WrittenMemory {
 public:
  static constexpr int kMaxParts = 8;

  struct __attribute__((packed)) Piece {
    uintptr_t begin;
    uint32_t owner : 29, part : 3;
  };

  void clear() { pieces_.clear(); }
  void reserve(size_t count) { pieces_.reserve(count); }
  void add(size_t owner, int part, const void* data) {
    Piece piece{reinterpret_cast<uintptr_t>(data), 0, 0};
    piece.owner = static_cast<uint32_t>(owner) & 0x1fffffff;
    piece.part = static_cast<uint32_t>(part) & (kMaxParts - 1);
    pieces_.push_back(piece);
  }
  void sort() {
    const auto precedes = [](const Piece& a, const Piece& b) { return a.begin < b.begin; };
    if (!std::is_sorted(pieces_.begin(), pieces_.end(), precedes)) std::sort(pieces_.begin(), pieces_.end(), precedes);
  }

  // Appends the owners of pieces that overlap each other. Needs sorted pieces, and must precede the search for readers.
  template <typename EndOf>
  void append_overlapping(const EndOf& end_of, std::vector<size_t>& owners) {
    reach_.clear();
    uintptr_t reach = 0;
    size_t furthest = 0;
    bool overlap = false;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const uintptr_t end = end_of(pieces_[i]);
      if (pieces_[i].begin < reach) {
        overlap = true;
        owners.push_back(pieces_[i].owner);
        owners.push_back(pieces_[furthest].owner);
      }
      if (end > reach) {
        reach = end;
        furthest = i;
      }
    }
    if (!overlap) return;
    reach_.reserve(pieces_.size());
    reach = 0;
    for (const Piece& piece : pieces_) reach_.push_back(reach = std::max(reach, end_of(piece)));
  }

  // Appends `reader` and the owners of all pieces that overlap what it reads.
  template <typename EndOf>
  void append_overlapping(size_t reader, const void* data, int64_t bytes, const EndOf& end_of,
                          std::vector<size_t>& owners) const {
    if (bytes <= 0) return;
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
    const auto next = std::lower_bound(pieces_.begin(), pieces_.end(), end,
                                       [](const Piece& piece, uintptr_t address) { return piece.begin < address; });
    for (size_t i = static_cast<size_t>(next - pieces_.begin()); i-- > 0;) {
      const uintptr_t piece_end = end_of(pieces_[i]);
      if (piece_end > begin) {
        owners.push_back(reader);
        owners.push_back(pieces_[i].owner);
      } else if (reach_.empty() || reach_[i] <= begin) {
        return;
      }
    }
  }

 private:
  std::vector<Piece> pieces_;
  std::vector<uintptr_t> reach_;  // the furthest end up to each piece; empty if no two pieces overlap
};

// Takes a list of addresses and bytes. Returns the indices of entries that overlap others, in ascending order. Empty
// entries overlap nothing.
inline std::vector<size_t> overlapping(const std::vector<std::pair<const void*, int64_t>>& list) {
  WrittenMemory memory;
  memory.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].second > 0) memory.add(i, 0, list[i].first);
  }
  memory.sort();
  std::vector<size_t> places;
  const auto end_of = [&](const WrittenMemory::Piece& piece) {
    return piece.begin + static_cast<uintptr_t>(list[piece.owner].second);
  };
  memory.append_overlapping(end_of, places);
  std::sort(places.begin(), places.end());
  places.erase(std::unique(places.begin(), places.end()), places.end());
  return places;
}

}  // namespace dracopt
