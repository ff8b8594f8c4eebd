// Plain C++: the reference for the other instruction sets, and what runs on everything that is not x86-64.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace swquant::cpu {
namespace {

void quantize(const Layout& layout, const float* a, int8_t* q, PieceScale* scales) {
  for (const Piece& piece : layout.pieces) {
    const float* from = a + piece.offset;
    int8_t* to = q + piece.offset;
    const int columns = piece.units * layout.unit_columns();
    float most = 0.0f;
    bool finite = true;
    for (int k = 0; k < piece.length; ++k) {
      const float magnitude = std::fabs(from[k]);
      finite &= magnitude <= 3.4028235e38f;  // false for NaN, too
      most = magnitude > most ? magnitude : most;
    }
    const float inverse = 127.0f / most;
    std::memset(to, 0, static_cast<size_t>(columns));
    *scales = {finite ? 0.0f : NAN, 0.0f};
    if (finite && std::isfinite(inverse)) {
      int32_t sum = 0;
      for (int k = 0; k < piece.length; ++k) {
        const auto code = static_cast<int32_t>(std::nearbyint(from[k] * inverse));
        to[k] = static_cast<int8_t>(code);
        sum += code;
      }
      *scales = {most / 127.0f, static_cast<float>(sum)};
    }
    ++scales;
  }
}

void multiply_int8(const Layout& layout, int64_t group, const int8_t* q, const PieceScale* scales, int64_t rows, float* y) {
  const uint8_t* codes = layout.group_codes(group);
  const int mask = (1 << layout.bits_stored) - 1;
  for (int64_t m = 0; m < rows; ++m, q += layout.padded, y += kGroup) {
    float total[kGroup] = {};
    for (const Piece& piece : layout.pieces) {
      int32_t sums[kGroup] = {};
      const uint8_t* lanes = codes + piece.unit * kUnit;
      const int8_t* activations = q + piece.offset;
      for (int unit = 0; unit < piece.units; ++unit, lanes += kUnit) {
        for (int i = 0; i < layout.per_byte; ++i, activations += 4) {
          for (int r = 0; r < kGroup; ++r) {
            for (int j = 0; j < 4; ++j) {
              sums[r] += (lanes[4 * r + j] >> (i * layout.bits_stored) & mask) * activations[j];
            }
          }
        }
      }
      const float* scale = layout.block_scales(group, piece.block);
      const Zeros zeros = layout.block_zeros(group, piece.block);
      for (int r = 0; r < kGroup; ++r) {
        total[r] += (static_cast<float>(sums[r]) - zeros.of_row(r) * scales->sum) * (scale[r] * scales->scale);
      }
      ++scales;
    }
    std::memcpy(y, total, sizeof total);
  }
}

void dequantize(const Layout& layout, int64_t group, int64_t first, int64_t last, float* panel) {
  const int mask = (1 << layout.bits_stored) - 1;
  for (int64_t p = first; p < last; ++p) {
    const Piece& piece = layout.pieces[static_cast<size_t>(p)];
    const uint8_t* lanes = layout.group_codes(group) + piece.unit * kUnit;
    const float* scale = layout.block_scales(group, piece.block);
    const Zeros zeros = layout.block_zeros(group, piece.block);
    for (int unit = 0; unit < piece.units; ++unit, lanes += kUnit) {
      for (int k = 0; k < layout.unit_columns(); ++k, panel += kGroup) {
        const int shift = k / 4 * layout.bits_stored;
        for (int r = 0; r < kGroup; ++r) {
          const auto code = static_cast<float>(lanes[4 * r + k % 4] >> shift & mask);
          panel[r] = (code - zeros.of_row(r)) * scale[r];
        }
      }
    }
  }
}

void multiply(const float* panel, int64_t columns, const float* a, int64_t stride, int64_t rows, float* y) {
  for (int64_t m = 0; m < rows; ++m, a += stride, y += kGroup) {
    float total[kGroup] = {};
    for (int64_t k = 0; k < columns; ++k) {
      for (int r = 0; r < kGroup; ++r) total[r] += a[k] * panel[k * kGroup + r];
    }
    for (int r = 0; r < kGroup; ++r) y[r] += total[r];
  }
}

}  // namespace

const Kernels kPortable = {"portable", quantize, multiply_int8, dequantize, multiply};

}  // namespace swquant::cpu
