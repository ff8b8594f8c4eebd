// A few rows of A go through one launch. More of them go through dequantize and the runtime's own Gemm, which a kernel may
// call on the stream that it was given. Accuracy level 4 is for CPUs: here sums are float32, so channels have nothing to
// correct.
#include "linear.h"

#include <algorithm>
#include <cinttypes>

#include "../node.h"
#include "launch.h"

namespace swquant::cuda {
namespace {

#if defined(SWQUANT_EMULATION)
constexpr const char* kMemory = "Cpu";
constexpr bool kHasGemm = false;  // of 16-bit floats: the kernels then take all rows in strips
#else
constexpr const char* kMemory = "Cuda";
constexpr bool kHasGemm = true;
#endif

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail("CUDA: %s: %s", what, cudaGetErrorString(error));
}

struct FreeDevice {
  void operator()(void* data) const { cudaFree(data); }
};
using DeviceBuffer = std::unique_ptr<void, FreeDevice>;

template <typename T>
DeviceBuffer upload(const std::vector<T>& values) {
  void* data = nullptr;
  const size_t bytes = values.size() * sizeof(T);
  check(cudaMalloc(&data, std::max<size_t>(bytes, 16)), "no memory for the weights");
  DeviceBuffer buffer(data);
  check(cudaMemcpy(data, values.data(), bytes, cudaMemcpyHostToDevice), "copying the weights");
  return buffer;
}

// Memory of one call, taken and given back in the order of the stream.
struct Scratch {
  void* data = nullptr;
  cudaStream_t stream;
  Scratch(size_t bytes, cudaStream_t stream) : stream(stream) {
    check(cudaMallocAsync(&data, bytes, stream), "no memory for the dequantized weights");
  }
  ~Scratch() { cudaFreeAsync(data, stream); }
  Scratch(const Scratch&) = delete;
};

// What the runtime made for us and takes back.
template <typename T, void (*release)(const ort::Api*, T*)>
struct Owned {
  const ort::Api* api;
  T* object = nullptr;
  explicit Owned(const ort::Api* api) : api(api) {}
  ~Owned() {
    if (object) release(api, object);
  }
  Owned(const Owned&) = delete;
};
using OwnedValue = Owned<ort::Value, ort::ReleaseValue>;

size_t size_of(ort::Type type) { return type == ort::kFloat ? 4 : 2; }

template <typename T>
std::vector<T> narrow(const std::vector<float>& values) {
  std::vector<T> result(values.size());
  std::transform(values.begin(), values.end(), result.begin(), [](float value) { return from_float<T>(value); });
  return result;
}

int bits_stored(int bits) { return bits == 2 ? 2 : bits <= 4 ? 4 : 8; }

// The rows' codes of 2, 4 or 8 bits as lanes read them. Columns past the last one have the zero point for a code, if it is one.
std::vector<Chunk> chunks_of(const swquant::Weights& weights, int stored, int32_t chunks) {
  std::vector<Chunk> result(static_cast<size_t>(weights.outputs * chunks), Chunk{});
  std::vector<uint8_t> row(static_cast<size_t>(chunks) * static_cast<size_t>(128 / stored));
  for (int64_t n = 0; n < weights.outputs; ++n) {
    unpack_row(weights.codes + n * weights.row_bytes, weights.row_bytes, weights.bits, weights.inputs, row.data());
    const int64_t last_block = (n / weights.block_rows + 1) * weights.blocks - 1;
    const float zero_point = weights.zero_points.empty() ? weights.default_zero_point() : weights.zero_points[static_cast<size_t>(last_block)];
    const uint8_t padding = is_code(zero_point, stored) ? static_cast<uint8_t>(zero_point) : 0;
    std::fill(row.begin() + weights.inputs, row.end(), padding);
    for (size_t k = 0; k < row.size(); ++k) {
      const Place place = place_of(stored, static_cast<int32_t>(k));
      Chunk& chunk = result[static_cast<size_t>(n * chunks + place.chunk)];
      chunk.words[place.bit / 32] |= static_cast<uint32_t>(row[k]) << (place.bit % 32);
    }
  }
  return result;
}

std::vector<int32_t> first_of_rows(const swquant::Weights& weights) {
  std::vector<int32_t> first(static_cast<size_t>(weights.outputs + 1));
  for (int32_t row : weights.outlier_rows) ++first[static_cast<size_t>(row + 1)];
  for (size_t n = 1; n < first.size(); ++n) first[n] += first[n - 1];
  return first;
}

}  // namespace

struct Linear::State {
  const ort::Api* api;
  std::string node;
  ort::Type type;
  int stored;
  int64_t inputs, outputs;
  float zero_point;
  int32_t chunks, blocks, block_rows, block_cols;
  Zeros zeros;
  bool matrix_units;
  DeviceBuffer codes, scales, zero_points, first_outlier, outlier_cols, outlier_deltas, bias;
  Owned<ort::MemoryInfo, ort::ReleaseMemoryInfo> memory;
  Owned<ort::Op, ort::ReleaseOp> gemm;

  State(const ort::Api* api, ort::Type type) : api(api), type(type), memory(api), gemm(api) {}

  template <typename T>
  void copy_floats(const swquant::Weights& from) {
    scales = upload(narrow<T>(from.scales));
    if (!from.zero_points.empty()) zero_points = upload(narrow<T>(from.zero_points));
    zeros = zeros_of<T>(from.zero_points.data(), from.zero_points.size(), stored);
    if (!from.bias.empty()) bias = upload(narrow<T>(from.bias));
  }

  template <typename T>
  Weights<T> weights() const {
    return {static_cast<const Chunk*>(codes.get()), static_cast<const T*>(scales.get()),
            static_cast<const T*>(zero_points.get()), static_cast<const int32_t*>(first_outlier.get()),
            static_cast<const int32_t*>(outlier_cols.get()), static_cast<const float*>(outlier_deltas.get()),
            static_cast<const T*>(bias.get()), zero_point, static_cast<int32_t>(inputs), static_cast<int32_t>(outputs),
            chunks, blocks, block_rows, block_cols, shift_of(block_cols, inputs), zeros, inputs * stored % 512 == 0,
            matrix_units};
  }

  void wrap(OwnedValue& value, const void* data, std::vector<int64_t> shape) const {
    size_t bytes = size_of(type);
    for (int64_t dimension : shape) bytes *= static_cast<size_t>(dimension);
    swquant::check(api, ort::CreateTensor(api, memory.object, const_cast<void*>(data), bytes, shape.data(), shape.size(),
                                          type, &value.object));
  }

  // y [rows, N] = a [rows, K] · Ŵᵀ + bias by the runtime's Gemm, Ŵ in scratch memory.
  template <typename T>
  void many_rows(const ort::KernelContext* context, const void* a, int64_t rows, void* y, cudaStream_t stream) const {
    Scratch restored(static_cast<size_t>(inputs * outputs) * sizeof(T), stream);
    check(launch_dequantize(weights<T>(), stored, static_cast<T*>(restored.data), stream), "dequantize");
    OwnedValue left(api), right(api), added(api), result(api);
    wrap(left, a, {rows, inputs});
    wrap(right, restored.data, {outputs, inputs});
    if (bias) wrap(added, bias.get(), {outputs});
    wrap(result, y, {rows, outputs});
    const ort::Value* operands[] = {left.object, right.object, added.object};
    swquant::check(api, ort::InvokeOp(api, context, gemm.object, operands, bias ? 3 : 2, &result.object, 1));
  }

  template <typename T>
  void run(const ort::KernelContext* context, const void* a, int64_t rows, void* y, cudaStream_t stream) const {
    const Weights<T> of = weights<T>();
    if (rows > few_rows(of) && gemm.object) return many_rows<T>(context, a, rows, y, stream);
    check(launch_rows(of, stored, static_cast<const T*>(a), static_cast<T*>(y), rows, stream), "linear_rows");
  }

  void prepare(const ort::KernelInfo* info) {
    int device = 0;
    check(cudaGetDevice(&device), "no device");
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "no device");
    matrix_units = type == ort::kFloat16 || (type == ort::kBfloat16 && major >= 8);
    swquant::check(api, ort::CreateMemoryInfo(api, kMemory, 0, device, ort::kOnDevice, &memory.object));
    if (!kHasGemm && type != ort::kFloat) return;
    // All of them: an operator made this way does not know its defaults.
    const int64_t no = 0, yes = 1;
    const float one = 1.0f;
    using Attribute = Owned<ort::OpAttribute, ort::ReleaseOpAttribute>;
    Attribute straight(api), transposed(api), alpha(api), beta(api);
    swquant::check(api, ort::CreateOpAttribute(api, "transA", &no, 1, ort::kInt, &straight.object));
    swquant::check(api, ort::CreateOpAttribute(api, "transB", &yes, 1, ort::kInt, &transposed.object));
    swquant::check(api, ort::CreateOpAttribute(api, "alpha", &one, 1, ort::kFloatAttribute, &alpha.object));
    swquant::check(api, ort::CreateOpAttribute(api, "beta", &one, 1, ort::kFloatAttribute, &beta.object));
    const ort::OpAttribute* attributes[] = {straight.object, transposed.object, alpha.object, beta.object};
    const char* name = "T";
    swquant::check(api, ort::CreateOp(api, info, "Gemm", "", 13, &name, &type, 1, attributes, 4, bias ? 3 : 2, 1, &gemm.object));
  }
};

Linear::Linear(const ort::Api* api, const ort::KernelInfo* info, ort::Type type)
    : state_(std::make_unique<State>(api, type)) {
  State& state = *state_;
  state.node = node_name(api, info);
  const swquant::Weights from = read_weights(api, info, type);
  state.stored = bits_stored(from.bits);
  state.inputs = from.inputs;
  state.outputs = from.outputs;
  state.zero_point = from.default_zero_point();
  state.chunks = static_cast<int32_t>((from.inputs * state.stored + 511) / 512 * 4);  // whole quads
  state.blocks = static_cast<int32_t>(from.blocks);
  state.block_rows = static_cast<int32_t>(from.block_rows);
  state.block_cols = static_cast<int32_t>(from.block_cols);
  state.codes = upload(chunks_of(from, state.stored, state.chunks));
  state.first_outlier = upload(first_of_rows(from));
  state.outlier_cols = upload(from.outlier_cols);
  state.outlier_deltas = upload(from.outlier_deltas);
  if (type == ort::kFloat) state.copy_floats<float>(from);
  if (type == ort::kFloat16) state.copy_floats<Half>(from);
  if (type == ort::kBfloat16) state.copy_floats<Bfloat>(from);
  state.prepare(info);
}
Linear::~Linear() = default;
Linear::Linear(Linear&&) noexcept = default;

void Linear::compute(ort::KernelContext* context) const {
  const State& state = *state_;
  const Activations in = read_activations(state.api, context, state.node, state.inputs, state.outputs);
  if (!in.rows) return;
  void* stream = nullptr;
  if (ort::Status* status = ort::GetStream(state.api, context, &stream)) ort::ReleaseStatus(state.api, status);
  auto* on = static_cast<cudaStream_t>(stream);
  if (state.type == ort::kFloat) state.run<float>(context, in.a, in.rows, in.y, on);
  if (state.type == ort::kFloat16) state.run<Half>(context, in.a, in.rows, in.y, on);
  if (state.type == ort::kBfloat16) state.run<Bfloat>(context, in.a, in.rows, in.y, on);
}

}  // namespace swquant::cuda
