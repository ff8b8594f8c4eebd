// The operator's constants, checked once when a kernel is created, in plain float32 and int32 whatever the graph holds.
//
//   Y = A · Ŵᵀ (+ outliers) (+ channels) (+ bias)      Ŵ[n,k] = (code[n,k] − zp[n/R,k/C]) · scale[n/R,k/C]
//
// With row_scales, scales and zero points are a byte each: scale = row_scales[n] · 2^(−(255 − byte) / 24), and a zero point
// counts in 256ths of the 2^bits codes, so that it lies between two of them.
//
// Nothing after this file looks at a shape, an index or an attribute with doubt: what does not fit is an Error here.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_api.h"

namespace swquant {

// Becomes an OrtStatus. The text names the value and the limit; the node's name is put in front of it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] [[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
void check(const ort::Api* api, ort::Status* status);  // throws Error where the runtime reports one

enum Input : size_t {
  kA, kCodes, kScales, kZeroPoints, kOutlierRows, kOutlierCols, kOutlierDeltas, kChannels, kBias, kRowScales,
  kInputs
};

struct Weights {
  int64_t inputs, outputs;  // K, N
  int bits;                 // 2 to 8
  int64_t block_rows, block_cols;  // R, C
  int64_t blocks, row_bytes;       // blocks in a row: ceil(K / C); bytes of a row of codes
  bool int8;                       // accuracy level 4
  ort::Type type;                  // of A, bias and Y
  const uint8_t* codes;            // [N, row_bytes], the runtime's: valid while the kernel is created
  std::vector<float> scales;       // [ceil(N / R), blocks]
  std::vector<float> zero_points;  // like scales, or empty: 2^(bits-1)
  std::vector<int32_t> outlier_rows, outlier_cols;  // sorted by (row, col), no pair twice
  std::vector<float> outlier_deltas;
  std::vector<int32_t> channels;
  std::vector<float> bias;             // [N] or empty

  float default_zero_point() const { return static_cast<float>(1 << (bits - 1)); }
};

// Reads and checks everything but A; throws Error.
Weights read_weights(const ort::Api* api, const ort::KernelInfo* info, ort::Type type);
std::string node_name(const ort::Api* api, const ort::KernelInfo* info);

// Shape and data of a tensor.
struct TensorView {
  ort::Type type;
  std::vector<int64_t> shape;
  void* data;
};
TensorView view(const ort::Api* api, const ort::Value* value);
std::string text(const std::vector<int64_t>& shape);

// Codes of one row as bytes: `count` codes of `bits` from a bit stream of `bytes` bytes, lowest bits first.
void unpack_row(const uint8_t* stream, int64_t bytes, int bits, int64_t count, uint8_t* codes);

}  // namespace swquant
