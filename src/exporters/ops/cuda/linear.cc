// Up to kMostRows rows of A go through linear_rows. More of them go through dequantize and the runtime's own Gemm, which a
// kernel may call on the stream that it was given; where the runtime has no Gemm of this element type, through linear_rows
// in strips. Accuracy level 4 is for CPUs: here everything is float32 arithmetic, so channels have nothing to correct.
#include "linear.h"

#include <algorithm>
#include <cinttypes>

#include "../node.h"
#include "launch.h"

namespace swquant::cuda {
namespace {

#if defined(SWQUANT_EMULATION)
constexpr const char* kMemory = "Cpu";
#else
constexpr const char* kMemory = "Cuda";
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

// Each row to whole chunks of codes of 2, 4 or 8 bits.
std::vector<Chunk> chunks_of(const swquant::Weights& weights, int stored) {
  const int64_t codes = 128 / stored, chunks = (weights.inputs + codes - 1) / codes;
  std::vector<Chunk> result(static_cast<size_t>(weights.outputs * chunks), Chunk{});
  std::vector<uint8_t> row(static_cast<size_t>(weights.inputs));
  for (int64_t n = 0; n < weights.outputs; ++n) {
    unpack_row(weights.codes + n * weights.row_bytes, weights.row_bytes, weights.bits, weights.inputs, row.data());
    for (int64_t k = 0; k < weights.inputs; ++k) {
      const int64_t bit = k % codes * stored;
      Chunk& chunk = result[static_cast<size_t>(n * chunks + k / codes)];
      chunk.words[bit / 32] |= static_cast<uint32_t>(row[static_cast<size_t>(k)]) << (bit % 32);
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
  DeviceBuffer codes, scales, zero_points, first_outlier, outlier_cols, outlier_deltas, bias;
  Owned<ort::MemoryInfo, ort::ReleaseMemoryInfo> memory;
  Owned<ort::Op, ort::ReleaseOp> gemm;

  State(const ort::Api* api, ort::Type type) : api(api), type(type), memory(api), gemm(api) {}

  template <typename T>
  void copy_floats(const swquant::Weights& from) {
    scales = upload(narrow<T>(from.scales));
    if (!from.zero_points.empty()) zero_points = upload(narrow<T>(from.zero_points));
    if (!from.bias.empty()) bias = upload(narrow<T>(from.bias));
  }

  template <typename T>
  Weights<T> weights() const {
    return {static_cast<const Chunk*>(codes.get()), static_cast<const T*>(scales.get()),
            static_cast<const T*>(zero_points.get()), static_cast<const int32_t*>(first_outlier.get()),
            static_cast<const int32_t*>(outlier_cols.get()), static_cast<const float*>(outlier_deltas.get()),
            static_cast<const T*>(bias.get()), zero_point, static_cast<int32_t>(inputs), static_cast<int32_t>(outputs),
            chunks, blocks, block_rows, block_cols};
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
    if (rows > kMostRows && gemm.object) return many_rows<T>(context, a, rows, y, stream);
    check(launch_rows(weights<T>(), stored, static_cast<const T*>(a), static_cast<T*>(y), rows, stream), "linear_rows");
  }

  void create_gemm(const ort::KernelInfo* info) {
    int device = 0;
    check(cudaGetDevice(&device), "no device");
    swquant::check(api, ort::CreateMemoryInfo(api, kMemory, 0, device, ort::kOnDevice, &memory.object));
    const int64_t yes = 1;
    Owned<ort::OpAttribute, ort::ReleaseOpAttribute> transposed(api);
    swquant::check(api, ort::CreateOpAttribute(api, "transB", &yes, 1, 1, &transposed.object));
    const char* name = "T";
    ort::Status* status = ort::CreateOp(api, info, "Gemm", "", 13, &name, &type, 1, &transposed.object, 1, bias ? 3 : 2, 1,
                                        &gemm.object);
    if (status) ort::ReleaseStatus(api, status);  // linear_rows does it all
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
  state.chunks = static_cast<int32_t>((from.inputs * state.stored + 127) / 128);
  state.blocks = static_cast<int32_t>(from.blocks);
  state.block_rows = static_cast<int32_t>(from.block_rows);
  state.block_cols = static_cast<int32_t>(from.block_cols);
  state.codes = upload(chunks_of(from, state.stored));
  state.first_outlier = upload(first_of_rows(from));
  state.outlier_cols = upload(from.outlier_cols);
  state.outlier_deltas = upload(from.outlier_deltas);
  if (type == ort::kFloat) state.copy_floats<float>(from);
  if (type == ort::kFloat16) state.copy_floats<Half>(from);
  if (type == ort::kBfloat16) state.copy_floats<Bfloat>(from);
  state.create_gemm(info);
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
