// What the host calls of the kernels. `bits` are those stored: 2, 4 or 8.
#pragma once
#include "arithmetic.h"
#if defined(SWQUANT_EMULATION)
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace swquant::cuda {

// How many rows of A one launch takes; more of them are better served by dequantize and the runtime's Gemm.
template <typename T>
int32_t few_rows(const Weights<T>& weights);

// y [rows, N] = a [rows, K] · Ŵᵀ + outliers + bias.
template <typename T>
cudaError_t launch_rows(const Weights<T>& weights, int bits, const T* a, T* y, int64_t rows, cudaStream_t stream);

// out [N, K] = Ŵ with its outliers restored. `out` lies at a multiple of 16 bytes.
template <typename T>
cudaError_t launch_dequantize(const Weights<T>& weights, int bits, T* out, cudaStream_t stream);

}  // namespace swquant::cuda
