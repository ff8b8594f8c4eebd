// What the kernels must give, bit for bit: the shared arithmetic in plain loops, in the order that the kernels add.
#pragma once
#include <vector>

#include "arithmetic.h"

namespace swquant::cuda {

template <typename T>
int64_t block_at(const Weights<T>& weights, int32_t n, int32_t k) {
  return static_cast<int64_t>(n / weights.block_rows) * weights.blocks + k / weights.block_cols;
}

template <typename T>
float reference_code(const Weights<T>& weights, int bits, int32_t n, int32_t k) {
  const Place place = place_of(bits, k);
  const uint32_t word = weights.codes[static_cast<int64_t>(n) * weights.chunks + place.chunk].words[place.bit / 32];
  return static_cast<float>(word >> (place.bit % 32) & ((1u << bits) - 1));
}

template <typename T>
float reference_weight(const Weights<T>& weights, int bits, int32_t n, int32_t k) {
  const int64_t at = block_at(weights, n, k);
  return decode(reference_code(weights, bits, n, k), zero_point_of(weights, at), scale_of(weights, at));
}

template <typename T>
float reference_bias(const Weights<T>& weights, int32_t n) { return weights.bias ? to_float(weights.bias[n]) : 0.0f; }

// What lanes make of their sums together, the first `shares` of them: pairs, pairs of pairs, ….
inline float sum_of_lanes(const float (&lanes)[kWarp], int shares = kWarp) {
  float sums[kWarp];
  std::memcpy(sums, lanes, sizeof sums);
  for (int offset = shares / 2; offset > 0; offset /= 2) {
    for (int lane = 0; lane < offset; ++lane) sums[lane] += sums[lane + offset];
  }
  return sums[0];
}

// Lane by lane, the outliers of row n are added to what the first `shares` lanes have.
template <typename T>
void add_outliers(const Weights<T>& weights, const T* a, int32_t n, float (&lanes)[kWarp], int shares = kWarp) {
  for (int32_t o = weights.first_outlier[n]; o < weights.first_outlier[n + 1]; ++o) {
    float& sum = lanes[(o - weights.first_outlier[n]) % shares];
    sum = multiply_add(to_float(a[weights.outlier_cols[o]]), weights.outlier_deltas[o], sum);
  }
}

// linear_rows: each lane of a warp adds the columns of its chunks and its share of the outliers, then lanes meet pairwise.
template <typename T>
float reference_by_lanes(const Weights<T>& weights, int bits, const T* a, int32_t n) {
  const int32_t pieces = 128 / bits / kPiece;
  float lanes[kWarp] = {};
  for (int32_t c = 0; c < weights.chunks; ++c) {
    for (int32_t i = 0; i < pieces; ++i) {
      const int32_t k = first_column(pieces, c, i);
      for (int32_t j = k; j < k + kPiece && k < weights.inputs; ++j) {
        const bool inside = j < weights.inputs;
        float& sum = lanes[c % kWarp];
        sum = inside ? multiply_add(to_float(a[j]), reference_weight(weights, bits, n, j), sum) : multiply_add(0.0f, 0.0f, sum);
      }
    }
  }
  add_outliers(weights, a, n, lanes);
  return sum_of_lanes(lanes) + reference_bias(weights, n);
}

// linear_tiles: each warp adds the columns of every `warps`-th quad, those of two spans before they are scaled; in a span, the
// first two columns of every piece come before the others. The warps' sums join bias and outliers, which so many lanes share
// out as there are for each of `rows` rows of A.
template <typename T>
float reference_by_tiles(const Weights<T>& weights, int bits, const T* a, int64_t rows, int32_t n) {
  const int32_t quad = 512 / bits, quads = weights.chunks / 4, warps = quads < 16 ? quads : 16;
  std::vector<float> parts(static_cast<size_t>(warps));
  for (int32_t start = 0; start < weights.inputs; start += 2 * kSpan) {
    const int64_t at = block_at(weights, n, start);
    float product = 0.0f;
    for (int32_t slot = 0; slot < 2 * kSpan; ++slot) {
      const int32_t k = start + slot / kSpan * kSpan + slot % 8 / 2 * kPiece + slot % kSpan / 8 * 2 + slot % 2;
      if (k >= weights.inputs) break;
      product = multiply_add(reference_code(weights, bits, n, k) - zero_point_of(weights, at), to_float(a[k]), product);
    }
    float& part = parts[static_cast<size_t>(start / quad % warps)];
    part = multiply_add(scale_of(weights, at), product, part);
  }
  float lanes[kWarp] = {};
  int shares = kWarp;
  while (shares * rows > kWarp) shares /= 2;
  add_outliers(weights, a, n, lanes, shares);
  float sum = sum_of_lanes(lanes, shares) + reference_bias(weights, n);
  for (float part : parts) sum += part;
  return sum;
}

// rows: of A in the launch, of which `a` is one.
template <typename T>
T reference_output(const Weights<T>& weights, int bits, const T* a, int64_t rows, int32_t n, bool tiles) {
  return from_float<T>(tiles ? reference_by_tiles(weights, bits, a, rows, n) : reference_by_lanes(weights, bits, a, n));
}

template <typename T>
T reference_restored(const Weights<T>& weights, int bits, int32_t n, int32_t k) {
  float value = reference_weight(weights, bits, n, k);
  for (int32_t o = weights.first_outlier[n]; o < weights.first_outlier[n + 1]; ++o) {
    if (weights.outlier_cols[o] == k) value += weights.outlier_deltas[o];
  }
  return from_float<T>(value);
}

}  // namespace swquant::cuda
