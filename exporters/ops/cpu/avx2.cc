// AVX2: eight rows of a group in a vector. Level 4 multiplies unsigned codes by signed activations with vpmaddubsw, whose
// 16-bit pairs cannot overflow as long as codes stay below 16 (8 · 2 · 15 · 127 < 2^15): four units are summed in 16 bits,
// then widened. Codes of 5 to 8 bits are therefore multiplied as two halves of four bits.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "strips.h"

namespace swquant::cpu {
namespace {

constexpr int kFlush = 4;  // units whose products are summed in 16 bits

inline __m256i four(const int8_t* q) {
  int32_t bits;
  std::memcpy(&bits, q, 4);
  return _mm256_set1_epi32(bits);
}

// Of 8 of the group's 16 rows.
inline __m256 zero_points_of(const Zeros& zeros, int h) {
  if (!zeros.bytes) return zeros.floats ? _mm256_load_ps(zeros.floats + 8 * h) : _mm256_set1_ps(zeros.usual);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros.bytes + 8 * h));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(zeros.unit));
}

// kPer: codes per byte. kRows rows of A at a time.
template <int kPer, int kRows>
void int8_rows(const Layout& layout, int64_t group, const int8_t* q, const PieceScale* scales, float* y) {
  constexpr int kShift = kPer == 4 ? 2 : 4;
  constexpr int kParts = kPer == 1 ? 2 : kPer;          // codes of a byte, or halves of one
  constexpr int kSums = kPer == 1 ? 2 : 1;              // halves are summed apart
  constexpr int kStep = kPer == 1 ? 0 : 4;              // halves of a code meet the same activation
  const __m256i mask = _mm256_set1_epi8(kPer == 4 ? 3 : 15);
  const __m256i weight[2] = {_mm256_set1_epi16(1), _mm256_set1_epi16(16)};
  const auto pieces = static_cast<int64_t>(layout.pieces.size());
  __m256 total[kRows][2];
#pragma GCC unroll 16
  for (auto& row : total) row[0] = row[1] = _mm256_setzero_ps();
  const uint8_t* codes = layout.group_codes(group);
  for (int64_t p = 0; p < pieces; ++p) {
    const Piece& piece = layout.pieces[static_cast<size_t>(p)];
    const uint8_t* lanes = codes + piece.unit * kUnit;
    const int8_t* activations = q + piece.offset;
    __m256i sums[kRows][2];
#pragma GCC unroll 16
    for (auto& row : sums) row[0] = row[1] = _mm256_setzero_si256();
    for (int unit = 0; unit < piece.units; unit += kFlush) {
      __m256i part[kRows][kSums][2];
#pragma GCC unroll 16
      for (auto& row : part)
#pragma GCC unroll 16
        for (auto& sum : row) sum[0] = sum[1] = _mm256_setzero_si256();
      const int end = std::min(piece.units, unit + kFlush);
      for (int u = unit; u < end; ++u, lanes += kUnit, activations += 4 * kPer) {
        if constexpr (kRows == 1) _mm_prefetch(reinterpret_cast<const char*>(lanes) + kAhead, _MM_HINT_T0);
        const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
        const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes + 32));
#pragma GCC unroll 16
        for (int i = 0; i < kParts; ++i) {
          const __m256i codes0 = _mm256_and_si256(_mm256_srli_epi16(low, i * kShift), mask);
          const __m256i codes1 = _mm256_and_si256(_mm256_srli_epi16(high, i * kShift), mask);
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
            const __m256i a = four(activations + m * layout.padded + i * kStep);
            auto& sum = part[m][kSums == 2 ? i : 0];
            sum[0] = _mm256_add_epi16(sum[0], _mm256_maddubs_epi16(codes0, a));
            sum[1] = _mm256_add_epi16(sum[1], _mm256_maddubs_epi16(codes1, a));
          }
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
        for (int s = 0; s < kSums; ++s) {
          sums[m][0] = _mm256_add_epi32(sums[m][0], _mm256_madd_epi16(part[m][s][0], weight[s]));
          sums[m][1] = _mm256_add_epi32(sums[m][1], _mm256_madd_epi16(part[m][s][1], weight[s]));
        }
      }
    }
    const float* scale = layout.block_scales(group, piece.block);
    const Zeros zeros = layout.block_zeros(group, piece.block);
#pragma GCC unroll 16
    for (int h = 0; h < 2; ++h) {
      const __m256 zero_point = zero_points_of(zeros, h);
      const __m256 w = _mm256_load_ps(scale + 8 * h);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const PieceScale& of = scales[m * pieces + p];
        const __m256 exact = _mm256_fnmadd_ps(zero_point, _mm256_set1_ps(of.sum), _mm256_cvtepi32_ps(sums[m][h]));
        total[m][h] = _mm256_fmadd_ps(exact, _mm256_mul_ps(w, _mm256_set1_ps(of.scale)), total[m][h]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    _mm256_storeu_ps(y + m * kGroup, total[m][0]);
    _mm256_storeu_ps(y + m * kGroup + 8, total[m][1]);
  }
}

template <int kPer>
void dequantize_piece(int units, const uint8_t* lanes, const float* scale, const Zeros& zeros, float* panel) {
  constexpr int kBits = 8 / kPer;
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
#pragma GCC unroll 16
  for (int h = 0; h < 2; ++h) {
    const __m256 w = _mm256_load_ps(scale + 8 * h);
    const __m256 zero_point = zero_points_of(zeros, h);
    float* to = panel + 8 * h;
    for (int unit = 0; unit < units; ++unit) {
      const __m256i four = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes + unit * kUnit + 32 * h));
#pragma GCC unroll 16
      for (int i = 0; i < kPer; ++i) {
        __m256i codes = _mm256_srli_epi32(four, i * kBits);
#pragma GCC unroll 16
        for (int j = 0; j < 4; ++j, to += kGroup) {
          const __m256 code = _mm256_cvtepi32_ps(_mm256_and_si256(codes, mask));
          _mm256_store_ps(to, _mm256_mul_ps(_mm256_sub_ps(code, zero_point), w));
          codes = _mm256_srli_epi32(codes, 8);
        }
      }
    }
  }
}

// kChains independent sums per row hide the latency of the additions where there are few rows.
template <int kRows>
void float_rows(const float* panel, int64_t columns, const float* a, int64_t stride, float* y) {
  constexpr int kChains = kRows < 4 ? 4 / kRows : 1;
  __m256 sums[kChains][kRows][2];
#pragma GCC unroll 16
  for (auto& chain : sums)
#pragma GCC unroll 16
    for (auto& row : chain) row[0] = row[1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < columns; k += kChains) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      const __m256 low = _mm256_load_ps(panel + (k + c) * kGroup);
      const __m256 high = _mm256_load_ps(panel + (k + c) * kGroup + 8);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const __m256 x = _mm256_broadcast_ss(a + m * stride + k + c);
        sums[c][m][0] = _mm256_fmadd_ps(x, low, sums[c][m][0]);
        sums[c][m][1] = _mm256_fmadd_ps(x, high, sums[c][m][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int h = 0; h < 2; ++h) {
      __m256 total = _mm256_loadu_ps(y + m * kGroup + 8 * h);
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) total = _mm256_add_ps(total, sums[c][m][h]);
      _mm256_storeu_ps(y + m * kGroup + 8 * h, total);
    }
  }
}

}  // namespace

void quantize_avx2(const Layout& layout, const float* a, int8_t* q, PieceScale* scales) {
  const __m128i magnitude = _mm_set1_epi32(0x7fffffff);
  for (const Piece& piece : layout.pieces) {
    const float* from = a + piece.offset;
    int8_t* to = q + piece.offset;
    const int columns = piece.units * layout.unit_columns();  // a multiple of 4
    // As integers, absolute values are ordered like floats, and NaN lies above infinity.
    __m256i most8 = _mm256_setzero_si256();
    int k = 0;
    for (; k + 8 <= columns; k += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
      most8 = _mm256_max_epi32(most8, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i most4 = _mm_max_epi32(_mm256_castsi256_si128(most8), _mm256_extracti128_si256(most8, 1));
    if (k < columns) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      most4 = _mm_max_epi32(most4, _mm_and_si128(bits, magnitude));
    }
    most4 = _mm_max_epi32(most4, _mm_shuffle_epi32(most4, 0x4e));
    most4 = _mm_max_epi32(most4, _mm_shuffle_epi32(most4, 0xb1));
    const float most = _mm_cvtss_f32(_mm_castsi128_ps(most4));
    const bool finite = _mm_cvtsi128_si32(most4) < 0x7f800000;
    const float inverse = 127.0f / most;
    if (!finite || !std::isfinite(inverse)) {
      std::memset(to, 0, static_cast<size_t>(columns));
      *scales++ = {finite ? 0.0f : NAN, 0.0f};
      continue;
    }
    __m128i sum = _mm_setzero_si128();
    for (k = 0; k < columns; k += 4) {
      const __m128i codes = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(from + k), _mm_set1_ps(inverse)));
      sum = _mm_add_epi32(sum, codes);
      const __m128i words = _mm_packs_epi32(codes, codes);
      const int32_t bytes = _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
      std::memcpy(to + k, &bytes, 4);
    }
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    *scales++ = {most / 127.0f, static_cast<float>(_mm_cvtsi128_si32(sum))};
  }
}

const Kernels kAvx2 = {"avx2", quantize_avx2, multiply_int8<4, 2>, dequantize, multiply<6>};

}  // namespace swquant::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
