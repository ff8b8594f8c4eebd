// How the CPU kernels see the weights: rows in groups of 16, so that one vector holds the same column of 16 outputs.
//
// A block's columns are cut into pieces, each padded to whole units: of at most 256, or 32 at level 4, which rounds
// activations piece by piece. MatMulNBits takes one scale for a whole block; with 32 the error is about half of that at blocks
// of 128 and the product as fast, as long as it waits for memory. A unit is 64 bytes: byte 4r + j belongs to row r of the
// group and holds the codes of columns j, 4 + j, 8 + j, … of the unit, lowest bits first. One 32-bit lane is thus what
// the dot-product instructions (vpdpbusd, vpmaddubsw) consume, and a mask and a shift give all 16 rows' codes.
//
//   codes per byte   columns of a unit   for bits
//   4                16                  2
//   2                8                   3, 4
//   1                4                   5 to 8, and any bits where short blocks would mostly be padding
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../weights.h"

namespace swquant::cpu {

constexpr int kGroup = 16;   // rows
constexpr int kUnit = 64;    // bytes
constexpr int64_t kPiece = 256;   // columns at most
constexpr int64_t kRounded = 32;  // at level 4

template <typename T>
struct Free {
  void operator()(T* data) const { std::free(data); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free<T>>;

// Uninitialized, at a multiple of 64 bytes; throws std::bad_alloc.
template <typename T>
Buffer<T> allocate(int64_t count);

struct Piece {
  int64_t block;
  int64_t start;   // first column
  int64_t offset;  // first column where every piece is padded
  int64_t unit;    // first unit
  int length;      // columns
  int units;
};

// The zero points of a block of a group's 16 rows: bytes times `unit`, or floats, or `usual` where there are neither.
struct Zeros {
  const uint8_t* bytes;
  const float* floats;
  float unit, usual;
  float of_row(int r) const { return bytes ? static_cast<float>(bytes[r]) * unit : floats ? floats[r] : usual; }
};

struct Layout {
  int per_byte;     // codes in a byte: 1, 2 or 4
  int bits_stored;  // 8 / per_byte
  int64_t inputs, outputs, groups, blocks;
  int64_t padded;  // columns with padding
  int64_t units;   // of a group
  float zero_point;  // where there are no others
  float zero_unit;
  std::vector<Piece> pieces;
  Buffer<uint8_t> codes;      // [groups][units][64]
  Buffer<float> scales;       // [groups][blocks][16]
  Buffer<uint8_t> zero_bytes;  // like scales, or null; a fourth of the memory that one row waits for
  Buffer<float> zero_points;   // the same where a byte cannot say them

  int unit_columns() const { return 4 * per_byte; }
  const uint8_t* group_codes(int64_t group) const { return codes.get() + group * units * kUnit; }
  const float* block_scales(int64_t group, int64_t block) const { return scales.get() + (group * blocks + block) * kGroup; }
  Zeros block_zeros(int64_t group, int64_t block) const {
    const int64_t at = (group * blocks + block) * kGroup;
    return {zero_bytes ? zero_bytes.get() + at : nullptr, zero_points ? zero_points.get() + at : nullptr, zero_unit, zero_point};
  }
};

Layout interleave(const Weights& weights);

}  // namespace swquant::cpu
