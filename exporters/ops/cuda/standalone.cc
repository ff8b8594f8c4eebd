// The kernels with nothing around them: on a CPU, through the emulator, or on a device, where nvcc compiles this file. Tests
// compare both with their reference (tests/exporters/ops/test_cuda.py), benchmarks/cuda_kernels.py times them.
#include <algorithm>
#include <vector>

#include "kernels.cu"
#include "reference.h"

namespace swquant::cuda {
namespace {

// Memory where the kernels run. In the emulator it is the caller's.
#if defined(SWQUANT_EMULATION)
struct Device {
  template <typename V>
  V* room(V* values, size_t) { return values; }
  template <typename V>
  const V* copy(const V* values, size_t) { return values; }
  template <typename V>
  void fetch(V*, const V*, size_t) {}
};
#else
struct Device {
  std::vector<void*> taken;
  ~Device() {
    for (void* data : taken) cudaFree(data);
  }
  template <typename V>
  V* room(const V*, size_t count) {
    void* data = nullptr;
    cudaMalloc(&data, std::max<size_t>(count * sizeof(V), 16));
    return taken.push_back(data), static_cast<V*>(data);
  }
  template <typename V>
  const V* copy(const V* values, size_t count) {
    if (!values) return nullptr;
    V* there = room(values, count);
    return cudaMemcpy(there, values, count * sizeof(V), cudaMemcpyHostToDevice), there;
  }
  template <typename V>
  void fetch(V* values, const V* there, size_t count) { cudaMemcpy(values, there, count * sizeof(V), cudaMemcpyDeviceToHost); }
};
#endif

// Everything by address, as Python's ctypes hands it over. Sizes: inputs, outputs, chunks, blocks, block_rows, block_cols.
template <typename T>
Weights<T> from_addresses(const void* const* data, const int32_t* sizes, Zeros zeros, int bits, float zero_point) {
  return {static_cast<const Chunk*>(data[0]), static_cast<const T*>(data[1]), static_cast<const T*>(data[2]),
          static_cast<const int32_t*>(data[3]), static_cast<const int32_t*>(data[4]), static_cast<const float*>(data[5]),
          static_cast<const T*>(data[6]), zero_point, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
          shift_of(sizes[5], sizes[0]), zeros, sizes[0] * bits % 512 == 0, true};
}

template <typename T>
size_t scales_of(const Weights<T>& weights) {
  return static_cast<size_t>((weights.outputs + weights.block_rows - 1) / weights.block_rows) * static_cast<size_t>(weights.blocks);
}

template <typename T>
Zeros zeros_at(const Weights<T>& weights, int bits) {
  std::vector<float> values(weights.zero_points ? scales_of(weights) : 0);
  std::transform(weights.zero_points, weights.zero_points + values.size(), values.begin(), [](T value) { return to_float(value); });
  return zeros_of<T>(values.data(), values.size(), bits);
}

template <typename T>
Weights<T> copied(Device& device, Weights<T> weights) {
  const auto outputs = static_cast<size_t>(weights.outputs);
  const auto outliers = static_cast<size_t>(weights.first_outlier[outputs]);
  const size_t scales = scales_of(weights);
  weights.codes = device.copy(weights.codes, outputs * static_cast<size_t>(weights.chunks));
  weights.scales = device.copy(weights.scales, scales);
  weights.zero_points = device.copy(weights.zero_points, scales);
  weights.first_outlier = device.copy(weights.first_outlier, outputs + 1);
  weights.outlier_cols = device.copy(weights.outlier_cols, outliers);
  weights.outlier_deltas = device.copy(weights.outlier_deltas, outliers);
  weights.bias = device.copy(weights.bias, outputs);
  return weights;
}

template <typename T>
void run(Weights<T> weights, int bits, bool reference, const T* a, int64_t rows, T* y, T* restored) {
  weights.zeros = zeros_at(weights, bits);
  const auto outputs = static_cast<size_t>(weights.outputs), inputs = static_cast<size_t>(weights.inputs);
  if (!reference) {
    Device device;
    const Weights<T> there = copied(device, weights);
    T *y_there = device.room(y, static_cast<size_t>(rows) * outputs), *restored_there = device.room(restored, outputs * inputs);
    launch_rows(there, bits, device.copy(a, static_cast<size_t>(rows) * inputs), y_there, rows, nullptr);
    launch_dequantize(there, bits, restored_there, nullptr);
    device.fetch(y, y_there, static_cast<size_t>(rows) * outputs);
    device.fetch(restored, restored_there, outputs * inputs);
    return;
  }
  const int64_t strip = few_rows(weights);
  for (int32_t n = 0; n < weights.outputs; ++n) {
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t launched = std::min(strip, rows - m / strip * strip);
      y[m * weights.outputs + n] =
          reference_output(weights, bits, a + m * weights.inputs, launched, n, strip > few_rows(Weights<float>{}));
    }
    for (int32_t k = 0; k < weights.inputs; ++k) {
      restored[static_cast<int64_t>(n) * weights.inputs + k] = reference_restored(weights, bits, n, k);
    }
  }
}

template <typename Body>
void with_type(const char* type, const Body& body) {
  if (!std::strcmp(type, "float32")) body(float{});
  if (!std::strcmp(type, "float16")) body(Half{});
  if (!std::strcmp(type, "bfloat16")) body(Bfloat{});
}

}  // namespace
}  // namespace swquant::cuda

#define SWQUANT_CALLED_BY_PYTHON extern "C" __attribute__((visibility("default")))

// The kernels, or their reference, on the host's arrays: y [rows, N] and restored, Ŵ [N, K].
SWQUANT_CALLED_BY_PYTHON void swquant_cuda(const char* type, int bits, bool reference, const void* const* data,
                                           const int32_t* sizes, float zero_point, const void* a, int64_t rows, void* y,
                                           void* restored) {
  using namespace swquant::cuda;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    run<T>(from_addresses<T>(data, sizes, Zeros::kAny, bits, zero_point), bits, reference, static_cast<const T*>(a), rows,
           static_cast<T*>(y), static_cast<T*>(restored));
  });
}

// The same where the kernels run, on a stream, without zero points: y, if it is not null, else Ŵ.
SWQUANT_CALLED_BY_PYTHON int swquant_cuda_launch(const char* type, int bits, const void* const* data, const int32_t* sizes,
                                                 float zero_point, const void* a, int64_t rows, void* y, void* restored,
                                                 void* stream) {
  using namespace swquant::cuda;
  cudaError_t error = cudaSuccess;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const auto weights = from_addresses<T>(data, sizes, Zeros::kUsual, bits, zero_point);
    const auto on = static_cast<cudaStream_t>(stream);
    error = y ? launch_rows(weights, bits, static_cast<const T*>(a), static_cast<T*>(y), rows, on)
              : launch_dequantize(weights, bits, static_cast<T*>(restored), on);
  });
  return static_cast<int>(error);
}
