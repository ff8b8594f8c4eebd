#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

namespace swquant::cpu {

template <typename T>
Buffer<T> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  void* data = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!data) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(data));
}
template Buffer<uint8_t> allocate(int64_t);
template Buffer<int8_t> allocate(int64_t);
template Buffer<float> allocate(int64_t);

namespace {

// Pieces of one row, and how many units they take.
int64_t cut(const Weights& weights, int unit_columns, std::vector<Piece>* pieces) {
  const int64_t most = std::min(weights.block_cols, weights.int8 ? kRounded : kPiece);
  int64_t unit = 0;
  for (int64_t start = 0; start < weights.inputs;) {
    const int64_t block = start / weights.block_cols;
    const int64_t end = std::min({start + most, (block + 1) * weights.block_cols, weights.inputs});
    const int length = static_cast<int>(end - start);
    const int units = (length + unit_columns - 1) / unit_columns;
    if (pieces) pieces->push_back({block, start, unit * unit_columns, unit, length, units});
    unit += units;
    start = end;
  }
  return unit;
}

// One row of a group into its lanes. `codes` holds the padded columns, zeros where there is padding.
void place(const uint8_t* codes, int64_t units, int per_byte, uint8_t* lanes) {
  for (int64_t unit = 0; unit < units; ++unit, lanes += kUnit, codes += 4 * per_byte) {
    uint32_t lane = 0;
    for (int i = 0; i < per_byte; ++i) {
      uint32_t four;
      std::memcpy(&four, codes + 4 * i, 4);
      lane |= four << (i * (8 / per_byte));
    }
    std::memcpy(lanes, &lane, 4);
  }
}

}  // namespace

Layout interleave(const Weights& weights) {
  Layout layout{};
  layout.inputs = weights.inputs;
  layout.outputs = weights.outputs;
  layout.blocks = weights.blocks;
  layout.zero_point = weights.default_zero_point();
  layout.groups = (weights.outputs + kGroup - 1) / kGroup;
  layout.per_byte = weights.bits == 2 ? 4 : weights.bits <= 4 ? 2 : 1;
  // A block of 5 columns takes one unit of 16 or two of 4: the smaller one wins, which for real blocks is the dense one.
  layout.units = cut(weights, 4 * layout.per_byte, nullptr);
  while (layout.per_byte > 1 && cut(weights, 2 * layout.per_byte, nullptr) <= layout.units) {
    layout.per_byte /= 2;
    layout.units = cut(weights, 4 * layout.per_byte, nullptr);
  }
  layout.bits_stored = 8 / layout.per_byte;
  cut(weights, layout.unit_columns(), &layout.pieces);
  layout.padded = layout.units * layout.unit_columns();

  const int64_t tables = layout.groups * layout.blocks * kGroup;
  layout.codes = allocate<uint8_t>(layout.groups * layout.units * kUnit);
  layout.scales = allocate<float>(tables);
  layout.zero_unit = static_cast<float>(1 << weights.bits) / 256.0f;
  const auto is_byte = [&](float zero) {
    const float steps = zero / layout.zero_unit;
    return steps >= 0.0f && steps <= 255.0f && steps == std::nearbyint(steps);
  };
  if (std::all_of(weights.zero_points.begin(), weights.zero_points.end(), is_byte)) {
    if (!weights.zero_points.empty()) layout.zero_bytes = allocate<uint8_t>(tables);
  } else {
    layout.zero_points = allocate<float>(tables);
  }
  std::vector<uint8_t> row(static_cast<size_t>(weights.inputs)), padded(static_cast<size_t>(layout.padded));
  for (int64_t n = 0; n < layout.groups * kGroup; ++n) {
    const bool real = n < weights.outputs;  // rows that fill the last group are zero
    if (real) {
      unpack_row(weights.codes + n * weights.row_bytes, weights.row_bytes, weights.bits, weights.inputs, row.data());
    } else {
      std::fill(row.begin(), row.end(), uint8_t{0});
    }
    for (const Piece& piece : layout.pieces) {
      std::memcpy(padded.data() + piece.offset, row.data() + piece.start, static_cast<size_t>(piece.length));
    }
    uint8_t* lanes = layout.codes.get() + n / kGroup * layout.units * kUnit + n % kGroup * 4;
    place(padded.data(), layout.units, layout.per_byte, lanes);
    for (int64_t block = 0; block < layout.blocks; ++block) {
      const int64_t to = (n / kGroup * layout.blocks + block) * kGroup + n % kGroup;
      const auto from = static_cast<size_t>(n / weights.block_rows * layout.blocks + block);
      layout.scales[static_cast<size_t>(to)] = real ? weights.scales[from] : 0.0f;
      if (layout.zero_points) layout.zero_points[static_cast<size_t>(to)] = real ? weights.zero_points[from] : 0.0f;
      if (layout.zero_bytes) {
        layout.zero_bytes[static_cast<size_t>(to)] = real ? static_cast<uint8_t>(weights.zero_points[from] / layout.zero_unit) : uint8_t{0};
      }
    }
  }
  return layout;
}

}  // namespace swquant::cpu
