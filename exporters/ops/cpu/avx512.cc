// AVX-512 with VNNI: all 16 rows of a group in a vector. Level 4 is vpdpbusd: four unsigned codes times four signed
// activations, added to 32-bit sums; the activations are broadcast from memory as part of the instruction.
#if defined(__x86_64__)
#if defined(SWQUANT_SIMDE)  // tests on a CPU without AVX-512: the same source, every intrinsic emulated
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include <cstring>

#include "kernels.h"

#if defined(SWQUANT_SIMDE)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif

#include "strips.h"

namespace swquant::cpu {
namespace {

#if defined(SWQUANT_SIMDE)  // what SIMDe lacks
inline __m512 to_floats(__m512i values) {
  int32_t in[16];
  float out[16];
  std::memcpy(in, &values, 64);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(in[i]);
  return _mm512_loadu_ps(out);
}
#define _mm512_cvtepi32_ps to_floats
#endif

inline __m512 zero_points_of(const Zeros& zeros) {
  if (!zeros.bytes) return zeros.floats ? _mm512_load_ps(zeros.floats) : _mm512_set1_ps(zeros.usual);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zeros.bytes)));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(zeros.unit));
}

inline __m512i four(const int8_t* q) {
  int32_t bits;
  std::memcpy(&bits, q, 4);
  return _mm512_set1_epi32(bits);
}

// kPer: codes per byte. kRows rows of A at a time. Few rows take two units at a time and sum each apart, because one
// chain of vpdpbusd would wait for itself.
template <int kPer, int kRows>
void int8_rows(const Layout& layout, int64_t group, const int8_t* q, const PieceScale* scales, float* y) {
  constexpr int kBits = 8 / kPer;
  constexpr int kUnits = kRows <= 2 ? 2 : 1;
  constexpr int kChains = kRows <= 2 && kPer > 1 ? 2 : 1;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
  const auto pieces = static_cast<int64_t>(layout.pieces.size());
  __m512 total[kRows];
#pragma GCC unroll 16
  for (auto& row : total) row = _mm512_setzero_ps();
  const uint8_t* codes = layout.group_codes(group);
  for (int64_t p = 0; p < pieces; ++p) {
    const Piece& piece = layout.pieces[static_cast<size_t>(p)];
    const uint8_t* lanes = codes + piece.unit * kUnit;
    const int8_t* activations = q + piece.offset;
    __m512i sums[kRows][kUnits][kChains];
#pragma GCC unroll 16
    for (auto& row : sums)
#pragma GCC unroll 16
      for (auto& unit : row)
#pragma GCC unroll 16
        for (auto& chain : unit) chain = _mm512_setzero_si512();
    const auto add = [&](int u) {
      if constexpr (kRows == 1) _mm_prefetch(reinterpret_cast<const char*>(lanes) + kAhead, _MM_HINT_T0);
      const __m512i packed = _mm512_load_si512(lanes);
#pragma GCC unroll 16
      for (int i = 0; i < kPer; ++i) {
        __m512i part = packed;
        if (i) part = _mm512_srli_epi16(part, static_cast<unsigned>(i * kBits));
        if (kPer > 1) part = _mm512_and_si512(part, mask);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          auto& sum = sums[m][u][i % kChains];
          sum = _mm512_dpbusd_epi32(sum, part, four(activations + m * layout.padded + 4 * i));
        }
      }
      lanes += kUnit;
      activations += 4 * kPer;
    };
    int unit = 0;
    for (; unit + kUnits <= piece.units; unit += kUnits) {
#pragma GCC unroll 16
      for (int u = 0; u < kUnits; ++u) add(u);
    }
    if (unit < piece.units) add(0);
    const __m512 scale = _mm512_load_ps(layout.block_scales(group, piece.block));
    const Zeros zeros = layout.block_zeros(group, piece.block);
    const __m512 zero_point = zero_points_of(zeros);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      __m512i whole = sums[m][0][0];
#pragma GCC unroll 16
      for (int s = 1; s < kUnits * kChains; ++s) whole = _mm512_add_epi32(whole, sums[m][s / kChains][s % kChains]);
      const PieceScale& of = scales[m * pieces + p];
      const __m512 exact = _mm512_fnmadd_ps(zero_point, _mm512_set1_ps(of.sum), _mm512_cvtepi32_ps(whole));
      total[m] = _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(of.scale)), total[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(y + m * kGroup, total[m]);
}

template <int kPer>
void dequantize_piece(int units, const uint8_t* lanes, const float* scale, const Zeros& zeros, float* panel) {
  constexpr int kBits = 8 / kPer;
  const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1);
  const __m512 w = _mm512_load_ps(scale);
  const __m512 zero_point = zero_points_of(zeros);
  for (int unit = 0; unit < units; ++unit, lanes += kUnit) {
    const __m512i packed = _mm512_load_si512(lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kPer; ++i) {
      __m512i codes = _mm512_srli_epi32(packed, static_cast<unsigned>(i * kBits));
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j, panel += kGroup) {
        const __m512 code = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask));
        _mm512_store_ps(panel, _mm512_mul_ps(_mm512_sub_ps(code, zero_point), w));
        codes = _mm512_srli_epi32(codes, 8);
      }
    }
  }
}

// kChains independent sums per row hide the latency of the additions where there are few rows.
template <int kRows>
void float_rows(const float* panel, int64_t columns, const float* a, int64_t stride, float* y) {
  constexpr int kChains = kRows == 1 ? 4 : 8 / kRows;
  __m512 sums[kChains][kRows];
#pragma GCC unroll 16
  for (auto& chain : sums)
#pragma GCC unroll 16
    for (auto& row : chain) row = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += kChains) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      const __m512 weights = _mm512_load_ps(panel + (k + c) * kGroup);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        sums[c][m] = _mm512_fmadd_ps(_mm512_set1_ps(a[m * stride + k + c]), weights, sums[c][m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    __m512 total = _mm512_loadu_ps(y + m * kGroup);
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) total = _mm512_add_ps(total, sums[c][m]);
    _mm512_storeu_ps(y + m * kGroup, total);
  }
}

}  // namespace

const Kernels kAvx512 = {"avx512", quantize_avx2, multiply_int8<8>, dequantize, multiply<8>};

}  // namespace swquant::cpu

#if defined(SWQUANT_SIMDE)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
