// Two kernels: what a row of Y is made of when there are few rows, and Ŵ itself when there are many.
//
//   linear_rows   a warp makes one output of up to kRows rows of A: it reads a row of codes once, 16 bytes per lane and
//                 512 bytes per instruction side by side, decodes in registers, multiplies, adds the row's outliers, and
//                 sums over the warp by shuffles. No shared memory, no atomics, nothing is written but Y.
//   dequantize    a thread decodes one chunk, puts the outliers of its row that fall into it back, and writes T for the
//                 runtime's own matrix product, which for many rows beats anything that decodes again per row.
//
// With SWQUANT_EMULATION the same text compiles for the CPU (emulation.h), where the tests compare every bit of the
// results with reference.h.
#if defined(SWQUANT_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#define SWQUANT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include "launch.h"

namespace swquant::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // in a block
constexpr int kEight = 8;  // columns whose activations are loaded together

// Eight activations of a row: one or two 128-bit loads where they are aligned and all there, else one by one.
template <typename T>
__device__ __forceinline__ void load_eight(const T* a, int32_t left, bool vector, float* x) {
  if (vector && left >= kEight) {
    Chunk parts[sizeof(T) / 2];
#pragma unroll
    for (int p = 0; p < static_cast<int>(sizeof(T) / 2); ++p) parts[p] = reinterpret_cast<const Chunk*>(a)[p];
    T values[kEight];
    memcpy(values, parts, sizeof values);
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = to_float(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = i < left ? to_float(a[i]) : 0.0f;
  }
}

// The next eight codes to the front of a chunk. (A loop over parts of a chunk that is not unrolled keeps the kernels small.)
template <int kBits>
__device__ __forceinline__ void advance(Chunk& chunk) {
  constexpr int kShift = kEight * kBits;  // 16, 32 or 64 bits
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kShift < 32) {
      chunk.words[i] = chunk.words[i] >> (kShift % 32) | (i < 3 ? chunk.words[i + 1 < 4 ? i + 1 : 3] << (32 - kShift % 32) : 0);
    } else {
      chunk.words[i] = i + kShift / 32 < 4 ? chunk.words[i + kShift / 32 < 4 ? i + kShift / 32 : 3] : 0;
    }
  }
}

// The weights of columns k … k + 7, whose codes come first in the chunk. Columns past the end are zero.
template <typename T, int kBits>
__device__ __forceinline__ void decode_eight(const Weights<T>& weights, const Chunk& chunk, int64_t scales, int32_t k,
                                             bool by_eights, float* w) {
  if (by_eights) {  // the usual blocks: eight columns share a scale
    const bool inside = k < weights.inputs;
    const int64_t at = scales + (inside ? k / weights.block_cols : 0);
    const float scale = scale_of(weights, at), zero_point = zero_point_of(weights, at);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      w[j] = k + j < weights.inputs ? decode(code_of<kBits>(chunk, j), zero_point, scale) : 0.0f;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const bool inside = k + j < weights.inputs;
      const int64_t at = scales + (inside ? (k + j) / weights.block_cols : 0);
      w[j] = inside ? decode(code_of<kBits>(chunk, j), zero_point_of(weights, at), scale_of(weights, at)) : 0.0f;
    }
  }
}

template <typename T, int kBits, int kRows>
__global__ void linear_rows(Weights<T> weights, const T* a, T* y, int32_t rows) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t n = static_cast<int32_t>(blockIdx.x) * kWarps + static_cast<int32_t>(threadIdx.x) / kWarp;
  if (n >= weights.outputs) return;  // the whole warp
  const bool by_eights = weights.block_cols % kEight == 0;
  const bool vector = weights.inputs % kEight == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0;
  const Chunk* codes = weights.codes + static_cast<int64_t>(n) * weights.chunks;
  const int64_t scales = static_cast<int64_t>(n / weights.block_rows) * weights.blocks;
  float sums[kRows] = {};
  for (int32_t c = lane; c < weights.chunks; c += kWarp) {
    Chunk chunk = codes[c];  // one 128-bit load
#pragma unroll 1
    for (int i = 0; i < kCodes<kBits>; i += kEight, advance<kBits>(chunk)) {
      const int32_t k = c * kCodes<kBits> + i;
      float w[kEight], x[kEight];
      decode_eight<T, kBits>(weights, chunk, scales, k, by_eights, w);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (m >= rows) break;
        load_eight(a + static_cast<int64_t>(m) * weights.inputs + k, weights.inputs - k, vector, x);
#pragma unroll
        for (int j = 0; j < kEight; ++j) sums[m] = multiply_add(x[j], w[j], sums[m]);
      }
    }
  }
  for (int32_t o = weights.first_outlier[n] + lane; o < weights.first_outlier[n + 1]; o += kWarp) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= rows) break;
      const float x = to_float(a[static_cast<int64_t>(m) * weights.inputs + weights.outlier_cols[o]]);
      sums[m] = multiply_add(x, weights.outlier_deltas[o], sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sums[m] += __shfl_xor_sync(0xffffffffu, sums[m], offset);
  }
  if (lane == 0) {
    const float bias = weights.bias ? to_float(weights.bias[n]) : 0.0f;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows) y[static_cast<int64_t>(m) * weights.outputs + n] = from_float<T>(sums[m] + bias);
    }
  }
}

template <typename T, int kBits>
__global__ void dequantize(Weights<T> weights, T* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= static_cast<int64_t>(weights.outputs) * weights.chunks) return;
  const auto n = static_cast<int32_t>(index / weights.chunks);
  const auto c = static_cast<int32_t>(index % weights.chunks);
  Chunk chunk = weights.codes[index];
  const bool by_eights = weights.block_cols % kEight == 0;
  const bool vector = weights.inputs % kEight == 0;
  const int64_t scales = static_cast<int64_t>(n / weights.block_rows) * weights.blocks;
  const int32_t first = weights.first_outlier[n], last = weights.first_outlier[n + 1];
#pragma unroll 1
  for (int i = 0; i < kCodes<kBits>; i += kEight, advance<kBits>(chunk)) {
    const int32_t k = c * kCodes<kBits> + i;
    float w[kEight];
    decode_eight<T, kBits>(weights, chunk, scales, k, by_eights, w);
    for (int32_t o = first; o < last; ++o) {  // a row has a handful, if any
      const int32_t j = weights.outlier_cols[o] - k;
#pragma unroll
      for (int e = 0; e < kEight; ++e) w[e] = e == j ? w[e] + weights.outlier_deltas[o] : w[e];
    }
    T values[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) values[j] = from_float<T>(w[j]);
    T* to = out + static_cast<int64_t>(n) * weights.inputs + k;
    if (vector && k < weights.inputs) {
      Chunk parts[sizeof(T) / 2];
      memcpy(parts, values, sizeof values);
#pragma unroll
      for (int p = 0; p < static_cast<int>(sizeof(T) / 2); ++p) reinterpret_cast<Chunk*>(to)[p] = parts[p];
    } else {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (k + j < weights.inputs) to[j] = values[j];
      }
    }
  }
}

template <typename T, int kBits>
void rows_of(const Weights<T>& weights, const T* a, T* y, int32_t rows, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((weights.outputs + kWarps - 1) / kWarps);
  constexpr unsigned kBlock = kWarp * kWarps;
  if (rows == 1) {
    SWQUANT_LAUNCH((linear_rows<T, kBits, 1>), grid, kBlock, stream, weights, a, y, rows);
  } else {
    SWQUANT_LAUNCH((linear_rows<T, kBits, kMostRows>), grid, kBlock, stream, weights, a, y, rows);
  }
}

}  // namespace

template <typename T>
cudaError_t launch_rows(const Weights<T>& weights, int bits, const T* a, T* y, int64_t rows, cudaStream_t stream) {
  for (int64_t m = 0; m < rows; m += kMostRows) {
    const auto some = static_cast<int32_t>(rows - m < kMostRows ? rows - m : kMostRows);
    const T* from = a + m * weights.inputs;
    T* to = y + m * weights.outputs;
    if (bits == 2) rows_of<T, 2>(weights, from, to, some, stream);
    if (bits == 4) rows_of<T, 4>(weights, from, to, some, stream);
    if (bits == 8) rows_of<T, 8>(weights, from, to, some, stream);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_dequantize(const Weights<T>& weights, int bits, T* out, cudaStream_t stream) {
  constexpr unsigned kBlock = 256;
  const int64_t threads = static_cast<int64_t>(weights.outputs) * weights.chunks;
  const auto grid = static_cast<unsigned>((threads + kBlock - 1) / kBlock);
  if (bits == 2) SWQUANT_LAUNCH((dequantize<T, 2>), grid, kBlock, stream, weights, out);
  if (bits == 4) SWQUANT_LAUNCH((dequantize<T, 4>), grid, kBlock, stream, weights, out);
  if (bits == 8) SWQUANT_LAUNCH((dequantize<T, 8>), grid, kBlock, stream, weights, out);
  return cudaGetLastError();
}

#define SWQUANT_INSTANTIATE(T)                                                                                   \
  template cudaError_t launch_rows<T>(const Weights<T>&, int, const T*, T*, int64_t, cudaStream_t);             \
  template cudaError_t launch_dequantize<T>(const Weights<T>&, int, T*, cudaStream_t);
SWQUANT_INSTANTIATE(float)
SWQUANT_INSTANTIATE(Half)
SWQUANT_INSTANTIATE(Bfloat)

}  // namespace swquant::cuda
