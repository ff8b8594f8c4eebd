// What the kernels must give, bit for bit: the shared arithmetic in plain loops, in the order that a warp adds.
#pragma once
#include "arithmetic.h"

namespace swquant::cuda {

template <typename T>
float reference_weight(const Weights<T>& weights, int bits, int32_t n, int32_t k) {
  const int codes = 128 / bits;
  const Chunk& chunk = weights.codes[static_cast<int64_t>(n) * weights.chunks + k / codes];
  const int i = k % codes;
  const float code = bits == 2 ? code_of<2>(chunk, i) : bits == 4 ? code_of<4>(chunk, i) : code_of<8>(chunk, i);
  const int64_t at = static_cast<int64_t>(n / weights.block_rows) * weights.blocks + k / weights.block_cols;
  return decode(code, zero_point_of(weights, at), scale_of(weights, at));
}

template <typename T>
T reference_output(const Weights<T>& weights, int bits, const T* a, int32_t n) {
  const int codes = 128 / bits;
  float lanes[32] = {};
  for (int32_t k = 0; k < weights.chunks * codes; ++k) {
    float& sum = lanes[k / codes % 32];
    sum = k < weights.inputs ? multiply_add(to_float(a[k]), reference_weight(weights, bits, n, k), sum)
                             : multiply_add(0.0f, 0.0f, sum);
  }
  for (int32_t o = weights.first_outlier[n]; o < weights.first_outlier[n + 1]; ++o) {
    float& sum = lanes[(o - weights.first_outlier[n]) % 32];
    sum = multiply_add(to_float(a[weights.outlier_cols[o]]), weights.outlier_deltas[o], sum);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    float before[32];
    std::memcpy(before, lanes, sizeof lanes);
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = before[lane] + before[lane ^ offset];
  }
  return from_float<T>(lanes[0] + (weights.bias ? to_float(weights.bias[n]) : 0.0f));
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
