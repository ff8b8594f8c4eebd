// The four inner loops of the CPU operator. Each instruction set has its own table of them (portable.cc, avx2.cc,
// avx512.cc); kernels() picks the best one that this CPU has, once. SWQUANT_CPU=portable|avx2|avx512 overrides it.
#pragma once
#include <cstdint>

#include "layout.h"

namespace swquant::cpu {

// Activations of one piece of a row at level 4: a ≈ scale · q. The sum of q corrects for zero points.
struct PieceScale {
  float scale, sum;
};

struct Kernels {
  const char* name;

  // One row at level 4. a and q: [padded], zeros in the padding. scales: [pieces].
  // q = round(a · (127 / max|a|)), to even; a piece with a NaN or infinity gets the scale NaN and zeros.
  void (*quantize)(const Layout&, const float* a, int8_t* q, PieceScale* scales);

  // y[m][16] = int8 product of one group's weights with `rows` quantized rows. q: [rows][padded], scales: [rows][pieces].
  void (*multiply_int8)(const Layout&, int64_t group, const int8_t* q, const PieceScale* scales, int64_t rows, float* y);

  // panel[column][16] = Ŵ of the pieces [first, last) of one group, padded columns included.
  void (*dequantize)(const Layout&, int64_t group, int64_t first, int64_t last, float* panel);

  // y[m][16] += a[m][0 … columns) · panel. `stride`: floats between rows of a.
  void (*multiply)(const float* panel, int64_t columns, const float* a, int64_t stride, int64_t rows, float* y);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
void quantize_avx2(const Layout&, const float* a, int8_t* q, PieceScale* scales);  // the same for both
#endif

// Throws Error where SWQUANT_CPU names a set that is unknown or that this CPU lacks.
const Kernels& kernels();

}  // namespace swquant::cpu
