// CUDA on one CPU core, enough of it to run kernels.cu unmodified: threads of a block are fibers that take turns.
//
// A fiber runs until it shuffles or ends. At a shuffle it leaves its value and lets the others run; when its turn comes
// again every lane of its warp has left one, because all lanes of a warp reach the same shuffles. Two sets of slots take
// turns, so nobody overwrites what a neighbour has yet to read. Memory is the host's, a stream is nothing.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define SWQUANT_STRIP(...) __VA_ARGS__
#define SWQUANT_LAUNCH(kernel, grid, block, stream, ...) \
  static_cast<void>(stream), swquant::cuda::emulation::launch(grid, block, [=] { SWQUANT_STRIP kernel(__VA_ARGS__); })

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "out of memory" : "no error"; }
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
inline cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t) { return cudaMalloc(data, bytes); }
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) { return cudaFree(data); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

namespace swquant::cuda::emulation {

struct Index {
  unsigned x;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned shuffles = 0;
  bool done = false;
};

struct Machine {
  Index thread{}, block{}, size{};
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<float> slots[2];
  const std::function<void()>* kernel;
};

inline Machine& machine() {
  static thread_local Machine machine;
  return machine;
}

inline void fiber_main() {
  Machine& m = machine();
  (*m.kernel)();
  m.fibers[m.thread.x].done = true;
  swapcontext(&m.fibers[m.thread.x].context, &m.scheduler);
}

inline void launch(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 << 10;
  Machine& m = machine();
  m.size.x = block;
  m.kernel = &kernel;
  m.fibers = std::vector<Fiber>(block);
  for (auto& slots : m.slots) slots.assign(block, 0.0f);
  for (auto& fiber : m.fibers) fiber.stack.reset(new char[kStack]);
  for (m.block.x = 0; m.block.x < grid; ++m.block.x) {
    for (auto& fiber : m.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      fiber.done = false;
      fiber.shuffles = 0;
      makecontext(&fiber.context, fiber_main, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (m.thread.x = 0; m.thread.x < block; ++m.thread.x) {
        Fiber& fiber = m.fibers[m.thread.x];
        if (fiber.done) continue;
        swapcontext(&m.scheduler, &fiber.context);
        running |= !fiber.done;
      }
    }
  }
}

}  // namespace swquant::cuda::emulation

#define threadIdx swquant::cuda::emulation::machine().thread
#define blockIdx swquant::cuda::emulation::machine().block
#define blockDim swquant::cuda::emulation::machine().size

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  auto& m = swquant::cuda::emulation::machine();
  const unsigned lane = m.thread.x;
  auto& fiber = m.fibers[lane];
  auto& slots = m.slots[fiber.shuffles++ % 2];
  slots[lane] = value;
  swapcontext(&fiber.context, &m.scheduler);
  return slots[lane ^ static_cast<unsigned>(offset)];
}
