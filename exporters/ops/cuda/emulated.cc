// The kernels as a CPU program, and what tests call of them and of their reference (tests/exporters/ops/test_cuda.py).
#include <algorithm>
#include <vector>

#include "kernels.cu"
#include "reference.h"

namespace swquant::cuda {
namespace {

// Everything by address, as Python's ctypes hands it over. Sizes: inputs, outputs, chunks, blocks, block_rows, block_cols.
template <typename T>
Weights<T> from_addresses(const void* const* data, const int32_t* sizes, int bits, float zero_point) {
  const auto* zero_points = static_cast<const T*>(data[2]);
  const int64_t count = zero_points ? int64_t{(sizes[1] + sizes[4] - 1) / sizes[4]} * sizes[3] : 0;
  std::vector<float> values(static_cast<size_t>(count));
  std::transform(zero_points, zero_points + count, values.begin(), [](T value) { return to_float(value); });
  return {static_cast<const Chunk*>(data[0]), static_cast<const T*>(data[1]), zero_points,
          static_cast<const int32_t*>(data[3]), static_cast<const int32_t*>(data[4]), static_cast<const float*>(data[5]),
          static_cast<const T*>(data[6]), zero_point, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
          shift_of(sizes[5], sizes[0]), zeros_of<T>(values.data(), values.size(), bits), sizes[0] * bits % 512 == 0, true};
}

template <typename T>
void run(const Weights<T>& weights, int bits, bool reference, const T* a, int64_t rows, T* y, T* restored) {
  if (!reference) {
    launch_rows(weights, bits, a, y, rows, nullptr);
    launch_dequantize(weights, bits, restored, nullptr);
    return;
  }
  const bool tiles = few_rows(weights) > few_rows(Weights<float>{});
  for (int32_t n = 0; n < weights.outputs; ++n) {
    for (int64_t m = 0; m < rows; ++m) y[m * weights.outputs + n] = reference_output(weights, bits, a + m * weights.inputs, n, tiles);
    for (int32_t k = 0; k < weights.inputs; ++k) {
      restored[static_cast<int64_t>(n) * weights.inputs + k] = reference_restored(weights, bits, n, k);
    }
  }
}

}  // namespace
}  // namespace swquant::cuda

extern "C" __attribute__((visibility("default"))) void swquant_cuda(const char* type, int bits, bool reference,
                                                                    const void* const* data, const int32_t* sizes,
                                                                    float zero_point, const void* a, int64_t rows, void* y,
                                                                    void* restored) {
  using namespace swquant::cuda;
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    run<T>(from_addresses<T>(data, sizes, bits, zero_point), bits, reference, static_cast<const T*>(a), rows, static_cast<T*>(y),
           static_cast<T*>(restored));
  };
  if (!std::strcmp(type, "float32")) with(float{});
  if (!std::strcmp(type, "float16")) with(Half{});
  if (!std::strcmp(type, "bfloat16")) with(Bfloat{});
}
