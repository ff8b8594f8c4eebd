// The arithmetic of the CUDA kernels, the same for device and host: how codes lie in memory, how a weight is decoded, how
// 16-bit floats are read and written. Both the kernels and their reference on the host (reference.h) are made of it, so
// that a kernel which runs in the emulator must give the same bits.
//
// A row of codes is a row of 16-byte chunks, lowest bits first, what one 128-bit load brings:
//
//   bits stored   for bits   codes in a chunk
//   2             2          64
//   4             3, 4       32
//   8             5 to 8     16
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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
};

template <int kBits>
constexpr int kCodes = 128 / kBits;  // in a chunk

template <int kBits>
SWQUANT_BOTH float code_of(const Chunk& chunk, int i) {
  const uint32_t word = chunk.words[i * kBits / 32];
  return static_cast<float>(word >> (i * kBits % 32) & ((1u << kBits) - 1));
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
