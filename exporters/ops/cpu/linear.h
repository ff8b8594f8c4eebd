// The operator on the CPU: constants in, kernel out; then A in, Y out.
#pragma once
#include <memory>

#include "../weights.h"

namespace swquant::cpu {

class Linear {
 public:
  Linear(const ort::Api* api, const ort::KernelInfo* info, ort::Type type);
  ~Linear();
  void compute(ort::KernelContext* context) const;  // throws Error

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace swquant::cpu
