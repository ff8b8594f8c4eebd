#include "node.h"

#include <cinttypes>

namespace swquant {

Activations read_activations(const ort::Api* api, ort::KernelContext* context, const std::string& node, int64_t inputs,
                             int64_t outputs) {
  const ort::Value* input = nullptr;
  check(api, ort::GetInput(api, context, kA, &input));
  if (!input) fail("node %s: input A is missing", node.c_str());
  TensorView a = view(api, input);
  if (a.shape.empty() || a.shape.back() != inputs) {
    fail("node %s: A has shape %s; its last dimension must be K = %" PRId64, node.c_str(), text(a.shape).c_str(), inputs);
  }
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < a.shape.size(); ++i) rows *= a.shape[i];
  a.shape.back() = outputs;
  ort::Value* output = nullptr;
  check(api, ort::GetOutput(api, context, 0, a.shape.data(), a.shape.size(), &output));
  void* y = nullptr;
  check(api, ort::GetTensorMutableData(api, output, &y));
  return {a.data, y, rows};
}

}  // namespace swquant
