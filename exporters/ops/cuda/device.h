// What the kernels are made of: codes to weights in float32 or, in pairs, in 16 bits; pieces of A; sums and products of a warp.
// kernels.cu alone includes it.
#pragma once
#if defined(SWQUANT_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime.h>
#define SWQUANT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include <type_traits>

#include "arithmetic.h"

namespace swquant::cuda {
namespace {

template <int kBits>
constexpr uint32_t kMask = (1u << kBits) - 1;

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Of the lanes whose numbers differ by a multiple of `apart`, a power of two.
__device__ __forceinline__ float sum_of_lanes_apart(float value, int apart) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset >= apart) value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}
__device__ __forceinline__ float sum_of_warp(float value) { return sum_of_lanes_apart(value, 1); }

// What lane l ^ 1 gives for it. All lanes of a warp come here.
__device__ __forceinline__ uint32_t swapped_with_neighbor(uint32_t word) {
  return bit_cast<uint32_t>(__shfl_xor_sync(0xffffffffu, bit_cast<float>(word), 1));
}

// A code in the lowest bits of 2^23 as a float adds its value: cheaper than a conversion.
__device__ __forceinline__ float code_of(uint32_t code) { return bit_cast<float>(code | 0x4b000000u) - 8388608.0f; }

// The next word of a chunk to its front. (A loop over words that is not unrolled keeps the kernels small.)
__device__ __forceinline__ void advance(Chunk& chunk) {
#pragma unroll
  for (int i = 0; i < 3; ++i) chunk.words[i] = chunk.words[i + 1];
}

template <typename T>
__device__ __forceinline__ int32_t block_of(const Weights<T>& weights, int32_t k) {
  return weights.block_shift >= 0 ? k >> weights.block_shift : k / weights.block_cols;
}

// Ŵ of piece i of a word in float32, columns k … k + 3; zeros past the end.
template <typename T, int kBits>
__device__ __forceinline__ void decode_piece(const Weights<T>& weights, uint32_t word, int i, int64_t scales, int32_t k,
                                             bool one_scale, float (&w)[kPiece]) {
  float scale = 0.0f, zero_point = 0.0f;
  if (one_scale && k < weights.inputs) {
    const int64_t at = scales + block_of(weights, k);
    scale = scale_of(weights, at), zero_point = zero_point_of(weights, at);
  }
#pragma unroll
  for (int j = 0; j < kPiece; ++j) {
    const bool inside = k + j < weights.inputs;
    if (!one_scale && inside) {
      const int64_t at = scales + (k + j) / weights.block_cols;
      scale = scale_of(weights, at), zero_point = zero_point_of(weights, at);
    }
    const float code = code_of(word >> bit_of(kBits, i, j) & kMask<kBits>);
    w[j] = inside ? decode(code, zero_point, scale) : 0.0f;
  }
}

#if defined(SWQUANT_EMULATION)
template <typename T>
void multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
  emulation::multiply(a, b, d, [](uint16_t bits) { return to_float(T{bits}); });
}
#else
// D [16, 8] += A [16, 16] · B [16, 8] of a warp.
template <typename T>
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4]) {
#if __CUDA_ARCH__ >= 800
#define SWQUANT_MULTIPLY(type)                                                                                         \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if (std::is_same<T, Half>::value) {
    SWQUANT_MULTIPLY("f16");
  } else {
    SWQUANT_MULTIPLY("bf16");
  }
#undef SWQUANT_MULTIPLY
#else  // Turing multiplies half as deep, and knows no bfloat16: the host does not come here with it
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
  }
#endif
}
#endif

// Two codes, in the halves of a word, minus their zero point, in T. base: of the zero point, from `base_of`. All of it is
// exact. kBetween: the zero point may lie between two codes, and is taken off after what was added to make a float of them.
template <typename T, int kBits, bool kBetween>
__device__ __forceinline__ uint32_t offset_pair(uint32_t codes, uint32_t base) {
#if defined(__CUDA_ARCH__)
  if (std::is_same<T, Half>::value) {  // 1024 + code has the code in its lowest bits
    const __half2 raised = bit_cast<__half2>(codes | 0x64006400u), zero = bit_cast<__half2>(base);
    return bit_cast<uint32_t>(kBetween ? __hsub2(__hsub2(raised, bit_cast<__half2>(0x64006400u)), zero) : __hsub2(raised, zero));
  }
#if __CUDA_ARCH__ >= 800
  if (kBits < 8) {  // 128 + code
    const __nv_bfloat162 raised = bit_cast<__nv_bfloat162>(codes | 0x43004300u), zero = bit_cast<__nv_bfloat162>(base);
    return bit_cast<uint32_t>(kBetween ? __hsub2(__hsub2(raised, bit_cast<__nv_bfloat162>(0x43004300u)), zero) : __hsub2(raised, zero));
  }
#endif
#endif
  const float zero_point = bit_cast<float>(base), even = code_of(codes & 0xffffu) - zero_point, odd = code_of(codes >> 16) - zero_point;
  return from_float<T>(even).bits | static_cast<uint32_t>(from_float<T>(odd).bits) << 16;
}
template <typename T, int kBits, bool kBetween>
__device__ __forceinline__ uint32_t base_of(float zero_point) {
#if defined(__CUDA_ARCH__)
  if (std::is_same<T, Half>::value) return from_float<T>((kBetween ? 0.0f : 1024.0f) + zero_point).bits * 0x10001u;
#if __CUDA_ARCH__ >= 800
  if (kBits < 8) return from_float<T>((kBetween ? 0.0f : 128.0f) + zero_point).bits * 0x10001u;
#endif
#endif
  return bit_cast<uint32_t>(zero_point);
}

// Both halves times their scale, rounded once.
template <typename T>
__device__ __forceinline__ uint32_t scaled_pair(uint32_t pair, uint32_t scale) {
#if defined(__CUDA_ARCH__)
  if (std::is_same<T, Half>::value) return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(pair), bit_cast<__half2>(scale)));
#if __CUDA_ARCH__ >= 800
  return bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(pair), bit_cast<__nv_bfloat162>(scale)));
#endif
#endif
  const auto low = [](uint32_t word) { return to_float(T{static_cast<uint16_t>(word)}); };
  const T even = from_float<T>(low(pair) * low(scale)), odd = from_float<T>(low(pair >> 16) * low(scale));
  return even.bits | static_cast<uint32_t>(odd.bits) << 16;
}

struct alignas(8) Pairs {  // a piece of a row of A
  uint32_t words[2];
};

// Four neighbouring values.
template <typename T>
struct alignas(kPiece * sizeof(T)) Piece {
  T values[kPiece];
};

// A piece of a row of A: one load where it is aligned and all there, else one by one.
template <typename T>
__device__ __forceinline__ void load_piece(const T* a, int32_t left, bool vector, float (&x)[kPiece]) {
  if (vector && left >= kPiece) {
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(a);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) x[j] = to_float(piece.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kPiece; ++j) x[j] = j < left ? to_float(a[j]) : 0.0f;
  }
}

}  // namespace
}  // namespace swquant::cuda
