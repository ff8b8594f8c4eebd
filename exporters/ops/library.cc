// The shared library's one entry point: registers LinearNBits of the domain `swquant` with an ONNX Runtime session.
//
// One OrtCustomOp per element type and execution provider. Once the library is registered the model-local function of
// the same name is no fallback any more, so every provider that a node may be placed on needs a kernel here.
#include <cstdio>
#include <exception>
#include <string>
#include <type_traits>

#include "cpu/linear.h"
#if defined(SWQUANT_CUDA) || defined(SWQUANT_EMULATION)
#include "cuda/linear.h"
#endif
#include "weights.h"

namespace swquant {
namespace {

constexpr const char* kDomain = "swquant";
constexpr const char* kName = "LinearNBits";

// No exception may cross the C interface.
template <typename Body>
ort::Status* guarded(const ort::Api* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return ort::CreateStatus(api, ort::kInvalidArgument, (std::string("swquant LinearNBits: ") + error.what()).c_str());
  } catch (const std::exception& error) {
    return ort::CreateStatus(api, ort::kFail, (std::string("swquant LinearNBits: ") + error.what()).c_str());
  }
}

template <typename Linear>
struct Kernel {
  const ort::Api* api;
  Linear linear;
};

// Y has the shape of A, but for the last dimension.
ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
  const ort::OpAttribute* attribute = nullptr;
  int64_t outputs = 0;
  size_t size = 0;
  ort::Shape* shape = nullptr;
  size_t rank = 0;
  ort::Status* status = ort::GetInferenceAttribute(api, context, "N", &attribute);
  if (!status) status = ort::ReadOpAttribute(api, attribute, 1, &outputs, sizeof outputs, &size);
  if (!status) status = ort::GetInputShape(api, context, kA, &shape);
  if (!status) status = ort::GetDimensionsCount(api, shape, &rank);
  if (status || !rank) return status;  // of unknown rank
  std::vector<int64_t> dimensions(rank);
  std::vector<const char*> names(rank);
  status = ort::GetDimensions(api, shape, dimensions.data(), rank);
  if (!status) status = ort::GetSymbolicDimensions(api, shape, names.data(), rank);
  if (status) return status;
  dimensions.back() = outputs;
  names.back() = "";
  ort::Type type = ort::kUndefined;
  status = ort::GetShapeType(api, shape, &type);
  ort::Shape* output = nullptr;
  if (!status) status = ort::CreateShape(api, &output);
  if (!status) status = ort::SetShapeType(api, output, type);
  if (!status) status = ort::SetShapeDimensions(api, output, dimensions.data(), rank);
  if (!status) status = ort::SetSymbolicDimensions(api, output, names.data(), rank);
  if (!status) status = ort::SetOutputShape(api, context, 0, output);
  if (output) ort::ReleaseShape(api, output);
  return status;
}

const ort::Api* g_api = nullptr;  // shape inference is not given one
// 1.20 follows a null pointer when an optional input is absent; 1.27 is the first that is known not to.
bool g_infers_shapes = false;

bool at_least_1_27(const char* version) {
  int major = 0, minor = 0;
  return std::sscanf(version, "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 27);
}

template <typename Linear, ort::Type type, bool on_device>
struct Operator : ort::CustomOp {
  explicit Operator(const char* provider) : ort::CustomOp{}, provider_(provider) {
    version = ort::kVersion;
    GetName = [](const CustomOp*) { return kName; };
    GetExecutionProviderType = [](const CustomOp* self) { return static_cast<const Operator*>(self)->provider_; };
    GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputs; };
    GetInputType = [](const CustomOp*, size_t index) {
      switch (index) {
        case kCodes: return ort::kUint8;
        case kScales: case kZeroPoints: case kRowScales: return ort::kUndefined;  // read_weights checks
        case kOutlierRows: case kOutlierCols: case kChannels: return ort::kInt32;
        case kOutlierDeltas: return ort::kFloat;
        default: return type;
      }
    };
    GetInputCharacteristic = [](const CustomOp*, size_t index) {
      return index <= kScales ? ort::kRequired : ort::kOptional;
    };
    // The constants are checked on the host, whatever the provider; a device gets its own copy in its own layout.
    GetInputMemoryType = [](const CustomOp*, size_t index) {
      return on_device && index != kA ? ort::kOnCpu : ort::kOnDevice;
    };
    GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
    GetOutputType = [](const CustomOp*, size_t) { return type; };
    GetOutputCharacteristic = [](const CustomOp*, size_t) { return ort::kRequired; };
    GetVariadicInputMinArity = GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
    GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
    CreateKernelV2 = [](const CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
      return guarded(api, [&] {
        try {
          *kernel = new Kernel<Linear>{api, Linear(api, info, type)};
        } catch (const Error& error) {
          throw Error("node " + node_name(api, info) + ": " + error.what());
        }
      });
    };
    KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
      const auto* own = static_cast<const Kernel<Linear>*>(kernel);
      return guarded(own->api, [&] { own->linear.compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel<Linear>*>(kernel); };
    GetStartVersion = [](const CustomOp*) { return 1; };
    GetEndVersion = [](const CustomOp*) { return 1; };
    if (g_infers_shapes) {
      InferOutputShapeFn = [](const CustomOp*, ort::ShapeInferContext* context) { return infer_shape(g_api, context); };
    }
  }
  const char* provider_;
};

template <typename Linear, bool on_device>
ort::Status* add_operators(const ort::Api* api, ort::CustomOpDomain* domain, const char* provider) {
  static const Operator<Linear, ort::kFloat, on_device> single(provider);
  static const Operator<Linear, ort::kFloat16, on_device> half(provider);
  static const Operator<Linear, ort::kBfloat16, on_device> bfloat(provider);
  for (const ort::CustomOp* op : {static_cast<const ort::CustomOp*>(&single), static_cast<const ort::CustomOp*>(&half),
                                  static_cast<const ort::CustomOp*>(&bfloat)}) {
    if (ort::Status* status = ort::CustomOpDomainAdd(api, domain, op)) return status;
  }
  return nullptr;
}

ort::CustomOpDomain* make_domain(const ort::Api* api, ort::Status** status) {
  ort::CustomOpDomain* domain = nullptr;
  *status = ort::CreateCustomOpDomain(api, kDomain, &domain);
#if defined(SWQUANT_EMULATION)  // tests: the CUDA operator in the place of the CPU's
  if (!*status) *status = add_operators<cuda::Linear, false>(api, domain, "CPUExecutionProvider");
#else
  if (!*status) *status = add_operators<cpu::Linear, false>(api, domain, "CPUExecutionProvider");
#endif
#if defined(SWQUANT_CUDA)
  if (!*status) *status = add_operators<cuda::Linear, true>(api, domain, "CUDAExecutionProvider");
#endif
  return domain;
}

}  // namespace
}  // namespace swquant

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                               const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kVersion);
  if (!api) return nullptr;  // a runtime before 1.17 has no way to tell; it then lacks the operator and says so
  swquant::g_api = api;
  swquant::g_infers_shapes = swquant::at_least_1_27(base->GetVersionString());
  static ort::Status* status = nullptr;
  static ort::CustomOpDomain* domain = swquant::make_domain(api, &status);  // lives as long as the process
  if (status) return status;
  return ort::AddCustomOpDomain(api, options, domain);
}
