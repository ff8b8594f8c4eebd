#include "weights.h"

#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "floats.h"

namespace swquant {

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error(message);
}

void check(const ort::Api* api, ort::Status* status) {
  if (!status) return;
  ort::ReleaseStatus(api, status);
  fail("the runtime refused a call that every version since 1.17 should serve");
}

std::string text(const std::vector<int64_t>& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

TensorView view(const ort::Api* api, const ort::Value* value) {
  ort::Shape* shape = nullptr;
  check(api, ort::GetTensorShape(api, value, &shape));
  TensorView result{};
  size_t rank = 0;
  ort::Status* status = ort::GetShapeType(api, shape, &result.type);
  if (!status) status = ort::GetDimensionsCount(api, shape, &rank);
  if (!status) {
    result.shape.resize(rank);
    status = ort::GetDimensions(api, shape, result.shape.data(), rank);
  }
  ort::ReleaseShape(api, shape);
  check(api, status);
  check(api, ort::GetTensorMutableData(api, const_cast<ort::Value*>(value), &result.data));
  return result;
}

std::string node_name(const ort::Api* api, const ort::KernelInfo* info) {
  size_t size = 0;
  ort::Status* status = ort::GetNodeName(api, info, nullptr, &size);
  if (status) ort::ReleaseStatus(api, status);
  std::string name(size, '\0');
  status = ort::GetNodeName(api, info, name.data(), &size);
  if (status) ort::ReleaseStatus(api, status);
  name.resize(std::strlen(name.c_str()));
  return name.empty() ? "without a name" : "'" + name + "'";
}

void unpack_row(const uint8_t* stream, int64_t bytes, int bits, int64_t count, uint8_t* codes) {
  // Eight codes are `bits` bytes. Three mask-and-shift steps open the gaps between them (exporters/packing.py).
  uint64_t masks[3];
  for (int level = 0; level < 3; ++level) {
    masks[level] = 0;
    for (int start = 0; start < 64; start += 16 << level) masks[level] |= ((1ull << (bits << level)) - 1) << start;
  }
  for (int64_t done = 0; done < count; done += 8) {
    const int64_t at = done / 8 * bits;
    uint64_t lane = 0;
    std::memcpy(&lane, stream + at, static_cast<size_t>(bytes - at < bits ? bytes - at : bits));
    for (int level = 2; bits < 8 && level >= 0; --level) {
      const int gap = (8 << level) - (bits << level);
      lane = (lane & masks[level]) | (lane << gap & masks[level] << (8 << level));
    }
    std::memcpy(codes + done, &lane, static_cast<size_t>(count - done < 8 ? count - done : 8));
  }
}

namespace {

const char* const kNames[kInputs] = {"A", "B", "scales", "zero_points", "outlier_rows", "outlier_cols",
                                     "outlier_deltas", "channels", "bias", "row_scales"};

struct Reader {
  const ort::Api* api;
  const ort::KernelInfo* info;
  size_t count = 0;

  int64_t attribute(const char* name, int64_t low, int64_t high, int64_t missing = -1) const {
    int64_t value = 0;
    if (ort::Status* status = ort::GetAttribute(api, info, name, &value)) {
      ort::ReleaseStatus(api, status);
      if (missing < 0) fail("attribute %s is missing or no integer", name);
      return missing;
    }
    if (value < low || value > high) {
      fail("attribute %s is %" PRId64 ", allowed are %" PRId64 " to %" PRId64, name, value, low, high);
    }
    return value;
  }

  bool present(Input input) const {
    if (input >= count) return false;
    size_t size = 0;
    if (ort::Status* status = ort::GetInputName(api, info, input, nullptr, &size)) ort::ReleaseStatus(api, status);
    return size > 1;  // an absent input has the name "", one byte with its end
  }

  TensorView constant(Input input) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    if (!present(input)) fail("input %s is missing", kNames[input]);
    check(api, ort::GetConstantInput(api, info, input, &is_constant, &value));
    if (!is_constant || !value) {
      fail("input %s is computed by the graph; it must be a constant initializer", kNames[input]);
    }
    return view(api, value);
  }

  void expect(Input input, const TensorView& tensor, ort::Type type, const std::vector<int64_t>& shape) const {
    if (tensor.type != type) fail("input %s has element type %d instead of %d", kNames[input], tensor.type, type);
    if (tensor.shape != shape) {
      fail("input %s has shape %s; the attributes ask for %s", kNames[input], text(tensor.shape).c_str(),
           text(shape).c_str());
    }
  }

  std::vector<float> floats(Input input, ort::Type type, const std::vector<int64_t>& shape) const {
    const TensorView tensor = constant(input);
    expect(input, tensor, type, shape);
    int64_t size = 1;
    for (int64_t dimension : shape) size *= dimension;
    std::vector<float> values(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      const float value = load(type, tensor.data, i);
      if (!std::isfinite(value)) fail("input %s holds %g at position %" PRId64, kNames[input], value, i);
      values[static_cast<size_t>(i)] = value;
    }
    return values;
  }

  // A vector of indices below `limit`, of any length.
  std::vector<int32_t> indices(Input input, int64_t limit) const {
    const TensorView tensor = constant(input);
    if (tensor.shape.size() != 1) {
      fail("input %s has shape %s instead of one dimension", kNames[input], text(tensor.shape).c_str());
    }
    expect(input, tensor, ort::kInt32, tensor.shape);
    const auto* data = static_cast<const int32_t*>(tensor.data);
    for (int64_t i = 0; i < tensor.shape[0]; ++i) {
      if (data[i] < 0 || data[i] >= limit) {
        fail("input %s holds %d at position %" PRId64 ", allowed are 0 to %" PRId64, kNames[input], data[i], i,
             limit - 1);
      }
    }
    return std::vector<int32_t>(data, data + tensor.shape[0]);
  }
};

int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

std::vector<float> read_zero_points(const Reader& reader, const Weights& weights, int64_t rows) {
  const TensorView tensor = reader.constant(kZeroPoints);
  if (tensor.type != ort::kUint8) return reader.floats(kZeroPoints, weights.type, {rows, weights.blocks});
  const int64_t bytes = ceil_divide(weights.blocks * weights.bits, 8);
  reader.expect(kZeroPoints, tensor, ort::kUint8, {rows, bytes});
  std::vector<uint8_t> codes(static_cast<size_t>(weights.blocks));
  std::vector<float> values;
  values.reserve(static_cast<size_t>(rows * weights.blocks));
  for (int64_t row = 0; row < rows; ++row) {
    unpack_row(static_cast<const uint8_t*>(tensor.data) + row * bytes, bytes, weights.bits, weights.blocks, codes.data());
    values.insert(values.end(), codes.begin(), codes.end());
  }
  return values;
}

// Scales and zero points of a byte each (calibrationless/quantized.py, Compact), as numbers.
void read_compact(const Reader& reader, Weights& weights, int64_t rows) {
  if (rows != weights.outputs) fail("row_scales go with blocks of one row; block_rows is %" PRId64, weights.block_rows);
  const bool single = reader.constant(kRowScales).type == ort::kFloat;
  const std::vector<float> of_rows = reader.floats(kRowScales, single ? ort::kFloat : ort::kFloat16, {rows});
  const TensorView exponents = reader.constant(kScales), zeros = reader.constant(kZeroPoints);
  reader.expect(kScales, exponents, ort::kUint8, {rows, weights.blocks});
  reader.expect(kZeroPoints, zeros, ort::kUint8, {rows, weights.blocks});
  float steps[256];
  for (int i = 0; i < 256; ++i) steps[i] = static_cast<float>(std::exp2(-(255 - i) / 24.0));
  const float unit = static_cast<float>(1 << weights.bits) / 256.0f;
  const auto* exponent = static_cast<const uint8_t*>(exponents.data);
  const auto* zero = static_cast<const uint8_t*>(zeros.data);
  for (int64_t i = 0; i < rows * weights.blocks; ++i) {
    weights.scales.push_back(of_rows[static_cast<size_t>(i / weights.blocks)] * steps[exponent[i]]);
    weights.zero_points.push_back(static_cast<float>(zero[i]) * unit);
  }
}

void read_outliers(const Reader& reader, Weights& weights) {
  const bool rows = reader.present(kOutlierRows), cols = reader.present(kOutlierCols);
  const bool deltas = reader.present(kOutlierDeltas);
  if (rows != cols || rows != deltas) fail("outlier_rows, outlier_cols and outlier_deltas belong together; one is missing");
  if (!rows) return;
  weights.outlier_rows = reader.indices(kOutlierRows, weights.outputs);
  weights.outlier_cols = reader.indices(kOutlierCols, weights.inputs);
  const size_t count = weights.outlier_rows.size();
  if (weights.outlier_cols.size() != count) {
    fail("outlier_rows has %zu elements and outlier_cols %zu", count, weights.outlier_cols.size());
  }
  weights.outlier_deltas = reader.floats(kOutlierDeltas, ort::kFloat, {static_cast<int64_t>(count)});
  for (size_t i = 1; i < count; ++i) {
    const int32_t row = weights.outlier_rows[i], col = weights.outlier_cols[i];
    const int32_t before = weights.outlier_rows[i - 1];
    if (before > row || (before == row && weights.outlier_cols[i - 1] >= col)) {
      fail("outlier %zu, [%d, %d], does not follow the one before it: they must be sorted by row and column, no pair twice",
           i, row, col);
    }
  }
}

void read_channels(const Reader& reader, Weights& weights) {
  if (!reader.present(kChannels)) return;
  weights.channels = reader.indices(kChannels, weights.inputs);
  std::vector<bool> seen(static_cast<size_t>(weights.inputs));
  for (int32_t channel : weights.channels) {
    if (seen[static_cast<size_t>(channel)]) fail("input channels holds %d twice", channel);
    seen[static_cast<size_t>(channel)] = true;
  }
}

}  // namespace

Weights read_weights(const ort::Api* api, const ort::KernelInfo* info, ort::Type type) {
  Reader reader{api, info};
  check(api, ort::GetInputCount(api, info, &reader.count));
  if (reader.count > kInputs) fail("the node has %zu inputs, allowed are %zu", reader.count, size_t{kInputs});
  constexpr int64_t kMost = (1ll << 31) - 1;
  Weights weights{};
  weights.type = type;
  weights.inputs = reader.attribute("K", 1, kMost);
  weights.outputs = reader.attribute("N", 1, kMost);
  weights.bits = static_cast<int>(reader.attribute("bits", 2, 8));
  weights.block_rows = reader.attribute("block_rows", 1, kMost, 1);
  weights.block_cols = reader.attribute("block_cols", 1, kMost);
  const int64_t level = reader.attribute("accuracy_level", 0, 4, 0);
  if (level != 0 && level != 4) fail("attribute accuracy_level is %" PRId64 ", allowed are 0 and 4", level);
  weights.int8 = level == 4;
  weights.blocks = ceil_divide(weights.inputs, weights.block_cols);
  weights.row_bytes = ceil_divide(weights.blocks * weights.block_cols * weights.bits, 8);

  const TensorView codes = reader.constant(kCodes);
  reader.expect(kCodes, codes, ort::kUint8, {weights.outputs, weights.row_bytes});
  weights.codes = static_cast<const uint8_t*>(codes.data);
  const int64_t rows = ceil_divide(weights.outputs, weights.block_rows);
  if (reader.present(kRowScales)) {
    read_compact(reader, weights, rows);
  } else {
    const bool half = type == ort::kFloat && reader.constant(kScales).type == ort::kFloat16;  // all that most scales need
    weights.scales = reader.floats(kScales, half ? ort::kFloat16 : type, {rows, weights.blocks});
    if (reader.present(kZeroPoints)) weights.zero_points = read_zero_points(reader, weights, rows);
  }
  for (size_t i = 0; i < weights.scales.size(); ++i) {
    const float zero_point = weights.zero_points.empty() ? weights.default_zero_point() : weights.zero_points[i];
    const float most = (std::fabs(zero_point) + 256.0f) * std::fabs(weights.scales[i]);
    if (!std::isfinite(most)) {
      fail("scale %g with zero point %g at position %zu leaves the range of float32", weights.scales[i], zero_point, i);
    }
  }
  read_outliers(reader, weights);
  read_channels(reader, weights);
  if (reader.present(kBias)) weights.bias = reader.floats(kBias, type, {weights.outputs});
  return weights;
}

}  // namespace swquant
