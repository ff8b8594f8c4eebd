// The arithmetic of the CUDA kernels, the same for device and host: how codes lie in memory, how a weight is decoded, how
// 16-bit floats are read and written. Both the kernels and their reference on the host (reference.h) are made of it, so
// that a kernel which runs in the emulator must give the same bits.
//
// A row of codes is a row of 16-byte chunks, what one 128-bit load brings. Four of them, a quad, hold whole spans of 16
// neighbouring columns, of each span four columns in each chunk, as a matrix product wants them from four neighbouring lanes:
//
//   bits stored   for bits   spans in a quad
//   2             2          16
//   4             3, 4       8
//   8             5 to 8     4
//
// In a 32-bit word the codes of even columns fill the lower half and those of odd columns the upper half, lowest bits first:
// one mask brings two neighbouring columns, each into its half.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SWQUANT_BOTH __host__ __device__ __forceinline__
#else
#define SWQUANT_BOTH inline
#endif

#include "../floats.h"

namespace swquant::cuda {

// 16-bit floats travel as bits; a device converts them with one instruction, with the same result.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

SWQUANT_BOTH float to_float(float value) { return value; }
SWQUANT_BOTH float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return half_to_float(value.bits);
#endif
}
SWQUANT_BOTH float to_float(Bfloat value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return bfloat_to_float(value.bits);
#endif
}

template <typename T>
SWQUANT_BOTH T from_float(float value);
template <>
SWQUANT_BOTH float from_float<float>(float value) {
  return value;
}
template <>
SWQUANT_BOTH Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return {float_to_half(value)};
#endif
}
template <>
SWQUANT_BOTH Bfloat from_float<Bfloat>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return {float_to_bfloat(value)};
#endif
}

struct alignas(16) Chunk {
  uint32_t words[4];
};

// What is known of the zero points. kUsual: none are stored, `zero_point` holds everywhere. kCodes: each is a code. kBetween:
// each lies between two codes so that the difference from a code is exact in T. kAny: nothing.
enum class Zeros { kUsual, kCodes, kBetween, kAny };

// The constants of a node where the kernels read them.
template <typename T>
struct Weights {
  const Chunk* codes;  // [N, chunks]
  const T* scales;     // [ceil(N / R), blocks]
  const T* zero_points;  // like scales, or null: `zero_point` everywhere
  const int32_t* first_outlier;  // [N + 1]: the outliers of row n are first[n] … first[n + 1) − 1
  const int32_t* outlier_cols;
  const float* outlier_deltas;
  const T* bias;  // [N] or null
  float zero_point;
  int32_t inputs, outputs, chunks, blocks, block_rows, block_cols;
  int32_t block_shift;  // a column's block is column >> block_shift; -1: block_cols is no power of two
  Zeros zeros;
  bool whole_quads;     // inputs fill the last one
  bool matrix_units;    // the device multiplies matrices of T
};

constexpr int kWarp = 32;
constexpr int kSpan = 16;  // columns
constexpr int kPiece = 4;  // columns of a span in one chunk

template <int kBits>
constexpr int kPieces = 128 / kBits / kPiece;  // in a chunk; one of each span of a quad

// First column of piece i of chunk c, where a chunk has `pieces`.
SWQUANT_BOTH int32_t first_column(int32_t pieces, int32_t c, int32_t i) {
  return (c / 4 * pieces + i) * kSpan + c % 4 * kPiece;
}

// Where the code of column j of piece i lies, in bits from the first of the chunk.
SWQUANT_BOTH int bit_of(int bits, int i, int j) {
  const int at = i * kPiece + j, in_word = 32 / bits;
  return at / in_word * 32 + at % 2 * 16 + at % in_word / 2 * bits;
}

// Where column k of a row lies: its chunk, and the first bit of its code there. What first_column and bit_of say, backwards.
struct Place {
  int32_t chunk;
  int bit;
};
SWQUANT_BOTH Place place_of(int bits, int32_t k) {
  const int32_t quad = 512 / bits;  // columns
  return {k / quad * 4 + k % kSpan / kPiece, bit_of(bits, k % quad / kSpan, k % kPiece)};
}

// For Weights: how far to shift a column for its block, or -1; whether a zero point is a code; what all of them are.
inline int32_t shift_of(int64_t block_cols, int64_t inputs) {
  if (block_cols >= inputs) return 31;
  int32_t shift = 0;
  while (int64_t{1} << shift < block_cols) ++shift;
  return int64_t{1} << shift == block_cols ? shift : -1;
}
inline bool is_code(float zero_point, int bits) {
  return zero_point >= 0.0f && zero_point < static_cast<float>(1 << bits) && zero_point == std::rint(zero_point);
}

template <typename T>
Zeros zeros_of(const float* values, size_t count, int bits) {
  // Of 2^bits codes, bfloat16 has 8 bits for a difference and half has 11.
  const float steps = static_cast<float>((std::is_same<T, Half>::value ? 2048 : 256) >> bits);
  const auto codes = [&](float value) { return is_code(value, bits); };
  const auto between = [&](float value) { return value >= 0.0f && value * steps == std::rint(value * steps) && value < static_cast<float>(1 << bits); };
  if (!count) return Zeros::kUsual;
  if (std::all_of(values, values + count, codes)) return Zeros::kCodes;
  return std::all_of(values, values + count, between) ? Zeros::kBetween : Zeros::kAny;
}

template <typename T>
SWQUANT_BOTH float scale_of(const Weights<T>& weights, int64_t at) { return to_float(weights.scales[at]); }

template <typename T>
SWQUANT_BOTH float zero_point_of(const Weights<T>& weights, int64_t at) {
  return weights.zero_points ? to_float(weights.zero_points[at]) : weights.zero_point;
}

// Ŵ in float32: one subtraction, one product.
SWQUANT_BOTH float decode(float code, float zero_point, float scale) { return (code - zero_point) * scale; }

SWQUANT_BOTH float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace swquant::cuda
