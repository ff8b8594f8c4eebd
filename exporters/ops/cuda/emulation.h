// CUDA on one CPU core, enough of it to run kernels.cu unmodified: threads of a block are fibers that take turns.
//
// A fiber runs until it meets others, in an exchange of its warp or at a barrier of its block, or ends. At an exchange it
// leaves its values and lets the others run; when its turn comes again every lane of its warp has left its own, because all
// lanes of a warp reach the same exchanges. Two sets of slots take turns, so nobody overwrites what a neighbour has yet to
// read. Blocks run one after another, so what they share is a static variable. Memory is the host's, a stream is nothing.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
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
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 8, cudaSuccess; }
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
  unsigned exchanges = 0, barriers = 0;
  bool done = false;
};

struct Lane {  // what it leaves for its warp
  uint32_t words[8];
};

struct Machine {
  Index thread{}, block{}, size{};
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Lane> slots[2];
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
  for (auto& slots : m.slots) slots.assign(block, Lane{});
  for (auto& fiber : m.fibers) fiber.stack.reset(new char[kStack]);
  for (m.block.x = 0; m.block.x < grid; ++m.block.x) {
    for (auto& fiber : m.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      fiber.done = false;
      fiber.exchanges = fiber.barriers = 0;
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

// Leaves `own` and returns what the lanes of the block have left at this exchange.
inline const Lane* exchange(const Lane& own) {
  Machine& m = machine();
  const unsigned thread = m.thread.x;
  Fiber& fiber = m.fibers[thread];
  auto& slots = m.slots[fiber.exchanges++ % 2];
  slots[thread] = own;
  swapcontext(&fiber.context, &m.scheduler);
  return slots.data() + thread / 32 * 32;
}

// The matrix product of a warp, D [16, 8] += A [16, 16] · B [16, 8], in the registers that mma.m16n8k16 documents: lane l has of
// A rows l / 4 and 8 more, of B column l / 4, of D columns 2 (l % 4) and the next; k in pairs. `decode` reads a 16-bit float.
template <typename Decode>
void multiply(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4], const Decode& decode) {
  const unsigned lane = machine().thread.x % 32;
  const Lane* lanes = exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, upper = i / 2, col = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quarter = k % 8 / 2, later = k / 8, shift = k % 2 * 16;
      const uint32_t left = lanes[row * 4 + quarter].words[later * 2 + upper] >> shift;
      const uint32_t right = lanes[col * 4 + quarter].words[4 + later] >> shift;
      d[i] = std::fmaf(decode(static_cast<uint16_t>(left)), decode(static_cast<uint16_t>(right)), d[i]);
    }
  }
}

}  // namespace swquant::cuda::emulation

#define threadIdx swquant::cuda::emulation::machine().thread
#define blockIdx swquant::cuda::emulation::machine().block
#define blockDim swquant::cuda::emulation::machine().size

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  using namespace swquant::cuda::emulation;
  const unsigned lane = machine().thread.x % 32;
  Lane own{};
  std::memcpy(own.words, &value, sizeof value);
  const Lane* lanes = exchange(own);
  std::memcpy(&value, lanes[lane ^ static_cast<unsigned>(offset)].words, sizeof value);
  return value;
}

inline void __syncthreads() {
  using namespace swquant::cuda::emulation;
  Machine& m = machine();
  Fiber& fiber = m.fibers[m.thread.x];
  const unsigned mine = ++fiber.barriers;
  const auto here = [mine](const Fiber& other) { return other.done || other.barriers >= mine; };
  while (!std::all_of(m.fibers.begin(), m.fibers.end(), here)) swapcontext(&fiber.context, &m.scheduler);
}
