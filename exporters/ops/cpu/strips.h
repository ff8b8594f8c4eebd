// The frame around the inner loops of avx2.cc and avx512.cc: rows of A in strips, weights in pieces. A set defines the
// three functions declared here and names its widest strip in its table: multiply_int8<8> takes 8 rows at a time, then 4,
// 2 and 1 of what is left. portable.cc keeps its plain loops: a reference shares nothing with what it checks.
//
// Included after kernels.h and the set's target pragma, because the compiler inlines only between functions of one target;
// so nothing of the standard library is included here. All is in an anonymous namespace: with external linkage the linker
// would keep one int8_strips<4, 4> for the whole library, and if it were AVX-512's, a CPU with only AVX2 would stop at it.
#pragma once

namespace swquant::cpu {
namespace {

// One row waits for memory, and the hardware's prefetching ends at every page: codes are asked for so many bytes ahead.
// Beyond the end that does no harm.
constexpr int kAhead = 2048;

// kPer: codes per byte. y[kRows][16] = int8 product of one group's weights with kRows quantized rows.
template <int kPer, int kRows>
void int8_rows(const Layout&, int64_t group, const int8_t* q, const PieceScale* scales, float* y);

// panel[column][16] = Ŵ of one piece: its units from `lanes` on, the 16 scales of its block, and its zero points.
template <int kPer>
void dequantize_piece(int units, const uint8_t* lanes, const float* scale, const Zeros& zeros, float* panel);

// y[kRows][16] += a[kRows][columns] · panel. columns: a multiple of 4.
template <int kRows>
void float_rows(const float* panel, int64_t columns, const float* a, int64_t stride, float* y);

// The strip for the rest: 8 → 4, 6 → 4, 4 → 2, 2 → 1.
constexpr int narrower(int rows) { return rows > 4 ? 4 : rows / 2; }

template <int kPer, int kRows>
void int8_strips(const Layout& layout, int64_t group, const int8_t* q, const PieceScale* scales, int64_t rows, float* y) {
  const auto pieces = static_cast<int64_t>(layout.pieces.size());
  for (; rows >= kRows; rows -= kRows, q += kRows * layout.padded, scales += kRows * pieces, y += kRows * kGroup) {
    int8_rows<kPer, kRows>(layout, group, q, scales, y);
  }
  if constexpr (kRows > 1) int8_strips<kPer, narrower(kRows)>(layout, group, q, scales, rows, y);
}

// kWide: the widest strip at one code per byte, where a set may have fewer registers to spare.
template <int kWidest, int kWide = kWidest>
void multiply_int8(const Layout& layout, int64_t group, const int8_t* q, const PieceScale* scales, int64_t rows, float* y) {
  switch (layout.per_byte) {
    case 4: return int8_strips<4, kWidest>(layout, group, q, scales, rows, y);
    case 2: return int8_strips<2, kWidest>(layout, group, q, scales, rows, y);
    default: return int8_strips<1, kWide>(layout, group, q, scales, rows, y);
  }
}

template <int kPer>
void dequantize_pieces(const Layout& layout, int64_t group, int64_t first, int64_t last, float* panel) {
  for (int64_t p = first; p < last; ++p) {
    const Piece& piece = layout.pieces[static_cast<size_t>(p)];
    const uint8_t* lanes = layout.group_codes(group) + piece.unit * kUnit;
    const float* scale = layout.block_scales(group, piece.block);
    const Zeros zeros = layout.block_zeros(group, piece.block);
    dequantize_piece<kPer>(piece.units, lanes, scale, zeros, panel);
    panel += piece.units * 4 * kPer * kGroup;
  }
}

void dequantize(const Layout& layout, int64_t group, int64_t first, int64_t last, float* panel) {
  switch (layout.per_byte) {
    case 4: return dequantize_pieces<4>(layout, group, first, last, panel);
    case 2: return dequantize_pieces<2>(layout, group, first, last, panel);
    default: return dequantize_pieces<1>(layout, group, first, last, panel);
  }
}

template <int kRows>
void multiply(const float* panel, int64_t columns, const float* a, int64_t stride, int64_t rows, float* y) {
  for (; rows >= kRows; rows -= kRows, a += kRows * stride, y += kRows * kGroup) {
    float_rows<kRows>(panel, columns, a, stride, y);
  }
  if constexpr (kRows > 1) multiply<narrower(kRows)>(panel, columns, a, stride, rows, y);
}

}  // namespace
}  // namespace swquant::cpu
