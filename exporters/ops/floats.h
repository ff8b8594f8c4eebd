// float16 and bfloat16 as bit patterns, rounded to nearest even: the same on the host and on a device.
#pragma once
#include <cstdint>
#include <cstring>

#include "ort_api.h"

namespace swquant {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinite or NaN
  if (magnitude >= 0x400) return from_bits(sign | ((magnitude << 13) + 0x38000000));
  const float small = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -small : small;
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lets the adder round at the right bit
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline float bfloat_to_float(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One element of a tensor of `type`.
inline float load(ort::Type type, const void* data, int64_t index) {
  if (type == ort::kFloat) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return type == ort::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}

inline void store(ort::Type type, void* data, int64_t index, float value) {
  if (type == ort::kFloat) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = type == ort::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
  }
}

}  // namespace swquant
