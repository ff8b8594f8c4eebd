// The operator on CUDA: constants are checked on the host, copied to the device once in the kernels' layout.
#pragma once
#include <memory>

#include "../weights.h"

namespace swquant::cuda {

class Linear {
 public:
  Linear(const ort::Api* api, const ort::KernelInfo* info, ort::Type type);
  ~Linear();
  Linear(Linear&&) noexcept;
  void compute(ort::KernelContext* context) const;  // throws Error

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace swquant::cuda
