// The part of ONNX Runtime's C interface that a custom operator needs.
//
// No package ships onnxruntime_c_api.h. None is needed: OrtApi is an append-only table of function pointers, so a slot
// number never changes once it is released, and version 17 of the table is served by every runtime from 1.17 on.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 17;
struct Api { void* slot[288]; };
struct ApiBase { const Api* (*GetApi)(uint32_t version); const char* (*GetVersionString)(); };

// Opaque objects of the runtime.
struct Status; struct SessionOptions; struct CustomOpDomain; struct KernelInfo; struct KernelContext; struct Value;
struct Shape; struct ShapeInferContext; struct Op; struct OpAttribute; struct MemoryInfo;

// ONNXTensorElementDataType
enum Type : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum Code : int { kFail = 1, kInvalidArgument = 2 };  enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kOnCpu = -2, kOnDevice = 0 };  enum AttributeType : int { kInt = 1, kFloatAttribute = 3 };

// OrtCustomOp of version 17: the runtime reads these callbacks; null where the default will do.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  Type (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Type (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

// One wrapper per slot: the number, and the signature that the runtime documents for it.
#define SLOT(number, result, name, parameters, ...)                                        \
  inline result name(const Api* api_, __VA_ARGS__) {                                       \
    using Function = result (*)(__VA_ARGS__);                                              \
    return reinterpret_cast<Function>(api_->slot[number]) parameters;                      \
  }
SLOT(0, Status*, CreateStatus, (c, m), Code c, const char* m)
SLOT(26, Status*, CreateCustomOpDomain, (n, d), const char* n, CustomOpDomain** d)
SLOT(27, Status*, CustomOpDomainAdd, (d, o), CustomOpDomain* d, const CustomOp* o)
SLOT(28, Status*, AddCustomOpDomain, (s, d), SessionOptions* s, CustomOpDomain* d)
SLOT(49, Status*, CreateTensor, (i, p, b, d, n, t, v), const MemoryInfo* i, void* p, size_t b, const int64_t* d, size_t n,
     Type t, Value** v)
SLOT(51, Status*, GetTensorMutableData, (v, d), Value* v, void** d)
SLOT(57, Status*, CreateShape, (s), Shape** s)
SLOT(58, Status*, SetShapeType, (s, t), Shape* s, Type t)
SLOT(59, Status*, SetShapeDimensions, (s, d, n), Shape* s, const int64_t* d, size_t n)
SLOT(60, Status*, GetShapeType, (s, t), const Shape* s, Type* t)
SLOT(61, Status*, GetDimensionsCount, (s, n), const Shape* s, size_t* n)
SLOT(62, Status*, GetDimensions, (s, d, n), const Shape* s, int64_t* d, size_t n)
SLOT(63, Status*, GetSymbolicDimensions, (s, d, n), const Shape* s, const char** d, size_t n)
SLOT(65, Status*, GetTensorShape, (v, s), const Value* v, Shape** s)
SLOT(68, Status*, CreateMemoryInfo, (n, a, d, t, i), const char* n, int a, int d, MemoryType t, MemoryInfo** i)
SLOT(86, Status*, GetAttribute, (i, n, v), const KernelInfo* i, const char* n, int64_t* v)
SLOT(90, Status*, GetInput, (c, i, v), const KernelContext* c, size_t i, const Value** v)
SLOT(91, Status*, GetOutput, (c, i, d, n, v), KernelContext* c, size_t i, const int64_t* d, size_t n, Value** v)
SLOT(93, void, ReleaseStatus, (s), Status* s)
SLOT(94, void, ReleaseMemoryInfo, (i), MemoryInfo* i)
SLOT(96, void, ReleaseValue, (v), Value* v)
SLOT(99, void, ReleaseShape, (s), Shape* s)
SLOT(193, Status*, GetStream, (c, s), const KernelContext* c, void** s)
SLOT(211, Status*, CreateOpAttribute, (n, d, s, t, a), const char* n, const void* d, int s, int t, OpAttribute** a)
SLOT(212, void, ReleaseOpAttribute, (a), OpAttribute* a)
SLOT(213, Status*, CreateOp, (i, n, d, v, tn, tv, tc, a, ac, in, out, o), const KernelInfo* i, const char* n, const char* d,
     int v, const char** tn, const Type* tv, int tc, const OpAttribute* const* a, int ac, int in, int out, Op** o)
SLOT(214, Status*, InvokeOp, (c, o, i, ni, r, nr), const KernelContext* c, const Op* o, const Value* const* i, int ni,
     Value* const* r, int nr)
SLOT(215, void, ReleaseOp, (o), Op* o)
SLOT(230, Status*, GetInputCount, (i, n), const KernelInfo* i, size_t* n)
SLOT(232, Status*, GetInputName, (i, x, n, s), const KernelInfo* i, size_t x, char* n, size_t* s)
SLOT(244, Status*, GetNodeName, (i, n, s), const KernelInfo* i, char* n, size_t* s)
SLOT(249, Status*, GetConstantInput, (i, x, c, v), const KernelInfo* i, size_t x, int* c, const Value** v)
SLOT(268, Status*, GetInputShape, (c, i, s), const ShapeInferContext* c, size_t i, Shape** s)
SLOT(269, Status*, GetInferenceAttribute, (c, n, a), const ShapeInferContext* c, const char* n, const OpAttribute** a)
SLOT(270, Status*, SetOutputShape, (c, i, s), const ShapeInferContext* c, size_t i, const Shape* s)
SLOT(271, Status*, SetSymbolicDimensions, (s, d, n), Shape* s, const char** d, size_t n)
SLOT(272, Status*, ReadOpAttribute, (a, t, d, n, s), const OpAttribute* a, int t, void* d, size_t n, size_t* s)
SLOT(274, Status*, ParallelFor, (c, f, t, b, u), const KernelContext* c, void (*f)(void*, size_t), size_t t, size_t b, void* u)
#undef SLOT

}  // namespace ort
