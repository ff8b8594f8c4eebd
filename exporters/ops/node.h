// A and Y of one call, the same for every provider.
#pragma once
#include "weights.h"

namespace swquant {

struct Activations {
  const void* a;  // [rows, K]
  void* y;        // [rows, N]
  int64_t rows;
};

// Takes A, checks its last dimension, and makes Y. Throws Error.
Activations read_activations(const ort::Api* api, ort::KernelContext* context, const std::string& node, int64_t inputs,
                             int64_t outputs);

}  // namespace swquant
