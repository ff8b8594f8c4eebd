// Three kernels: products for few rows of A, in matrix units or without, and Ŵ itself for many rows.
//
//   linear_tiles  16-bit floats. A block makes 16 outputs of up to 16 rows of A; its warps share the quads of columns. A lane
//                 loads 16 bytes of codes each of two rows of Ŵ and takes their zero points off, two weights at a time,
//                 which is exact in 16 bits; the warp multiplies them in matrix units, whose sums are float32, and
//                 scales the sums block by block. The warps' sums meet in shared memory, where the outliers join them.
//   linear_rows   what matrix units lack (float32), and blocks and zero points of any kind. A warp makes two outputs of
//                 up to 8 rows of A; a weight is decoded to float32; lanes' sums meet by shuffles.
//   dequantize    a block decodes a row, puts the row's outliers back, and writes T for the runtime's own matrix product,
//                 which for many rows beats anything that decodes again per strip of rows.
//
// No kernel uses atomics, each code is read once, and several loads of every lane are under way at any time.
//
// With SWQUANT_EMULATION the same text compiles for the CPU (emulation.h), where the tests compare every bit of the
// results with reference.h.
#include <type_traits>

#include "device.h"
#include "launch.h"

namespace swquant::cuda {
namespace {

constexpr int kMostWarps = 16;    // of a block of linear_tiles
constexpr int kTile = 8;          // rows of A in a matrix product
constexpr int kTileOutputs = 16;  // and outputs
constexpr int kRowWarps = 4;      // of a block of linear_rows
constexpr int kRowOutputs = 2;    // of a warp there
constexpr int kMostRows = 8;      // of A there

// What a lane needs of a quad beside A: its chunks of two rows, and their scales and zero points; two spans share one.
template <typename T, int kBits>
struct Quad {
  static constexpr int kScales = kPieces<kBits> / 2;
  Chunk chunk[2];
  T scale[kScales][2], zero_point[kScales][2];
};

template <typename T, int kBits, Zeros kZeros>
__device__ __forceinline__ Quad<T, kBits> load_quad(const Weights<T>& weights, const Chunk* const (&codes)[2],
                                                    const int64_t (&scales)[2], int32_t quad) {
  Quad<T, kBits> loaded;
#pragma unroll
  for (int u = 0; u < 2; ++u) loaded.chunk[u] = codes[u][4 * quad];  // 128-bit loads
#pragma unroll
  for (int g = 0; g < Quad<T, kBits>::kScales; ++g) {
    const int32_t k = (quad * kPieces<kBits> + 2 * g) * kSpan, last = weights.inputs - kSpan;
    const int32_t block = (k < last ? k : last) >> weights.block_shift;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      loaded.scale[g][u] = weights.scales[scales[u] + block];
      if (kZeros != Zeros::kUsual) loaded.zero_point[g][u] = weights.zero_points[scales[u] + block];
    }
  }
  return loaded;
}

// For weights that fit, see fits_tiles.
template <typename T, int kBits, int kTiles, Zeros kZeros>
__global__ void __launch_bounds__(kWarp* kMostWarps, kTiles == 1 ? 2 : 1)
    linear_tiles(Weights<T> weights, const T* __restrict__ a, T* y, int32_t rows) {
  __shared__ float parts[kMostWarps][kTileOutputs][kTile * kTiles], rest[kTileOutputs][kTile * kTiles];
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp, warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t warps = static_cast<int32_t>(blockDim.x) / kWarp;
  const int32_t quarter = lane % 4, row = lane / 4;  // of the matrix product: which columns a lane brings, and whose
  const int32_t n = static_cast<int32_t>(blockIdx.x) * kTileOutputs;
  // Rows past the last output or the last row of A: another is read in their place, and never written. So no load waits
  // for a comparison. Columns past the last one have codes that are their zero point.
  const Chunk* codes[2];
  int64_t scales[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const int32_t of = n + row + 8 * u < weights.outputs ? n + row + 8 * u : n;
    codes[u] = weights.codes + static_cast<int64_t>(of) * weights.chunks + quarter;
    scales[u] = static_cast<int64_t>(of / weights.block_rows) * weights.blocks;
  }
  const T* from[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int32_t m = t * kTile + row < rows ? t * kTile + row : 0;
    from[t] = a + static_cast<int64_t>(m) * weights.inputs + quarter * kPiece;
  }
  float sums[kTiles][4] = {};
  const int32_t last = weights.inputs - kSpan;
  Quad<T, kBits> now = load_quad<T, kBits, kZeros>(weights, codes, scales, warp);
  // While it is on its way: a warp adds up the outliers of an output, for all rows of A at once. Their loads wait for each
  // other, so few rows share them out among many lanes: a lane has one row, and every `shares`-th outlier.
  int32_t shares = kWarp;
  while (shares * rows > kWarp) shares /= 2;
  const int32_t apart = kWarp / shares, mine = lane % apart < rows ? lane % apart : 0;
  const T* x = a + static_cast<int64_t>(mine) * weights.inputs;
  for (int32_t output = warp; output < kTileOutputs && n + output < weights.outputs; output += warps) {
    const int32_t first = weights.first_outlier[n + output], end = weights.first_outlier[n + output + 1];
    const float bias = weights.bias ? to_float(weights.bias[n + output]) : 0.0f;
    float sum = 0.0f;
    for (int32_t o = first + lane / apart; o < end; o += shares) {
      sum = multiply_add(to_float(x[weights.outlier_cols[o]]), weights.outlier_deltas[o], sum);
    }
    if (first < end) sum = sum_of_lanes_apart(sum, apart);
    if (lane < rows) rest[output][lane] = sum + bias;
  }
  for (int32_t quad = warp; quad * 4 < weights.chunks;) {  // the same for the whole warp
#pragma unroll
    for (int g = 0; g < Quad<T, kBits>::kScales; ++g) {
      Pairs right[kTiles][2];
      uint32_t left[2][4];  // of each span k in pairs: both rows' first, both rows' second
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int32_t k = (quad * kPieces<kBits> + 2 * g + s) * kSpan;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) right[t][s] = *reinterpret_cast<const Pairs*>(from[t] + (k < last ? k : last));
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const int bit = bit_of(kBits, 2 * g + s, p / 2 * 2), u = p % 2;
          const uint32_t pair = now.chunk[u].words[bit / 32] >> bit % 32 & kMask<kBits> * 0x10001u;
          const float zero_point = kZeros == Zeros::kUsual ? weights.zero_point : to_float(now.zero_point[g][u]);
          constexpr bool kBetween = kZeros == Zeros::kBetween;
          left[s][p] = offset_pair<T, kBits, kBetween>(pair, base_of<T, kBits, kBetween>(zero_point));
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float products[4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) multiply<T>(left[s], right[t][s].words, products);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[t][e] = multiply_add(to_float(now.scale[g][e / 2]), products[e], sums[t][e]);
      }
    }
    quad += warps;
    if (quad * 4 < weights.chunks) now = load_quad<T, kBits, kZeros>(weights, codes, scales, quad);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) parts[warp][row + e / 2 * 8][t * kTile + quarter * 2 + e % 2] = sums[t][e];
  }
  __syncthreads();
  for (auto i = static_cast<int32_t>(threadIdx.x); i < kTileOutputs * rows; i += static_cast<int32_t>(blockDim.x)) {
    const int32_t m = i / kTileOutputs, output = i % kTileOutputs;
    if (n + output >= weights.outputs) continue;
    float sum = rest[output][m];
#pragma unroll
    for (int part = 0; part < kMostWarps; ++part) {
      if (part < warps) sum += parts[part][output][m];
    }
    y[static_cast<int64_t>(m) * weights.outputs + n + output] = from_float<T>(sum);
  }
}

template <typename T, int kBits, int kRows>
__global__ void __launch_bounds__(kWarp* kRowWarps) linear_rows(Weights<T> weights, const T* __restrict__ a, T* y, int32_t rows) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t n = (static_cast<int32_t>(blockIdx.x) * kRowWarps + static_cast<int32_t>(threadIdx.x) / kWarp) * kRowOutputs;
  if (n >= weights.outputs) return;  // the whole warp
  const bool vector = weights.inputs % kPiece == 0 && reinterpret_cast<uintptr_t>(a) % (kPiece * sizeof(T)) == 0;
  const bool one_scale = weights.block_cols % kPiece == 0;
  const Chunk* codes[kRowOutputs];
  int64_t scales[kRowOutputs];
#pragma unroll
  for (int r = 0; r < kRowOutputs; ++r) {
    const int32_t of = n + r < weights.outputs ? n + r : n;  // past the last one: read, never written
    codes[r] = weights.codes + static_cast<int64_t>(of) * weights.chunks;
    scales[r] = static_cast<int64_t>(of / weights.block_rows) * weights.blocks;
  }
  float sums[kRowOutputs][kRows] = {};
  Chunk ahead[kRowOutputs] = {};  // loaded while the chunk before is worked on
#pragma unroll
  for (int r = 0; r < kRowOutputs; ++r) {
    if (lane < weights.chunks) ahead[r] = codes[r][lane];
  }
  for (int32_t c = lane; c < weights.chunks; c += kWarp) {
    Chunk chunk[kRowOutputs];
#pragma unroll
    for (int r = 0; r < kRowOutputs; ++r) {
      chunk[r] = ahead[r];
      if (c + kWarp < weights.chunks) ahead[r] = codes[r][c + kWarp];
    }
    constexpr int kOfWord = kPieces<kBits> / 4;
#pragma unroll 1
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int i = 0; i < kOfWord; ++i) {
        const int32_t k = first_column(kPieces<kBits>, c, word * kOfWord + i);
        if (k >= weights.inputs) break;
        float w[kRowOutputs][kPiece], x[kPiece];
#pragma unroll
        for (int r = 0; r < kRowOutputs; ++r) decode_piece<T, kBits>(weights, chunk[r].words[0], i, scales[r], k, one_scale, w[r]);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          if (m >= rows) break;
          load_piece(a + static_cast<int64_t>(m) * weights.inputs + k, weights.inputs - k, vector, x);
#pragma unroll
          for (int r = 0; r < kRowOutputs; ++r) {
#pragma unroll
            for (int j = 0; j < kPiece; ++j) sums[r][m] = multiply_add(x[j], w[r][j], sums[r][m]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowOutputs; ++r) advance(chunk[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRowOutputs; ++r) {
    if (n + r >= weights.outputs) break;
    for (int32_t o = weights.first_outlier[n + r] + lane; o < weights.first_outlier[n + r + 1]; o += kWarp) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (m >= rows) break;
        const float x = to_float(a[static_cast<int64_t>(m) * weights.inputs + weights.outlier_cols[o]]);
        sums[r][m] = multiply_add(x, weights.outlier_deltas[o], sums[r][m]);
      }
    }
    const float bias = weights.bias ? to_float(weights.bias[n + r]) : 0.0f;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      sums[r][m] = sum_of_warp(sums[r][m]);
      if (lane == 0 && m < rows) y[static_cast<int64_t>(m) * weights.outputs + n + r] = from_float<T>(sums[r][m] + bias);
    }
  }
}

// Ŵ of an outlier's place, with it.
template <typename T, int kBits>
__device__ __forceinline__ T with_outlier(const Weights<T>& weights, const Chunk* codes, int64_t scales, int32_t k, float delta) {
  const Place place = place_of(kBits, k);
  const uint32_t code = codes[place.chunk].words[place.bit / 32] >> place.bit % 32 & kMask<kBits>;
  const int64_t at = scales + k / weights.block_cols;
  return from_float<T>(decode(code_of(code), zero_point_of(weights, at), scale_of(weights, at)) + delta);
}

// A lane's part of a row of Ŵ, chunk c, 16 bits and the usual blocks: two spans at a time. Of both a lane has a piece, its
// neighbour the next one; they swap one, so that each writes eight columns of one span, 16 bytes. All lanes of a warp come
// here; those past the last chunk write nothing.
template <typename T, int kBits, Zeros kZeros>
__device__ __forceinline__ void write_chunk(const Weights<T>& weights, const Chunk& chunk, int64_t scales, int32_t c, T* to) {
  constexpr bool kBetween = kZeros == Zeros::kBetween;
  const int32_t odd = c % 2, last = weights.inputs - kSpan;
#pragma unroll
  for (int i = 0; i < kPieces<kBits>; i += 2) {
    const int32_t span = (c / 4 * kPieces<kBits> + i) * kSpan;
    const int64_t at = scales + ((span < last ? span : last) >> weights.block_shift);
    const uint32_t base = base_of<T, kBits, kBetween>(zero_point_of(weights, at)), scale = weights.scales[at].bits * 0x10001u;
    uint32_t pairs[2][2];  // of both spans
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int bit = bit_of(kBits, i + p / 2, p % 2 * 2);
      const uint32_t pair = chunk.words[bit / 32] >> bit % 32 & kMask<kBits> * 0x10001u;
      pairs[p / 2][p % 2] = scaled_pair<T>(offset_pair<T, kBits, kBetween>(pair, base), scale);
    }
    uint32_t words[4];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const uint32_t kept = odd ? pairs[1][p] : pairs[0][p], other = swapped_with_neighbor(odd ? pairs[0][p] : pairs[1][p]);
      words[p] = odd ? other : kept, words[2 + p] = odd ? kept : other;
    }
    const int32_t k = span + odd * kSpan;
    if (c < weights.chunks && k <= last) {
      *reinterpret_cast<Chunk*>(to + k + c % 4 / 2 * 2 * kPiece) = {words[0], words[1], words[2], words[3]};
    }
  }
}

// A block decodes a row of Ŵ, then puts the row's outliers back. What a thread puts back first it has made before: its loads
// wait for each other, and nothing for them.
template <typename T, int kBits, Zeros kZeros>
__global__ void dequantize(Weights<T> weights, T* out) {
  const auto n = static_cast<int32_t>(blockIdx.x), thread = static_cast<int32_t>(threadIdx.x), step = static_cast<int32_t>(blockDim.x);
  const int64_t scales = static_cast<int64_t>(n / weights.block_rows) * weights.blocks;
  const Chunk* codes = weights.codes + static_cast<int64_t>(n) * weights.chunks;
  T* to = out + static_cast<int64_t>(n) * weights.inputs;
  const int32_t first = weights.first_outlier[n] + thread, last = weights.first_outlier[n + 1];
  const auto restored = [&](int32_t o) {
    return with_outlier<T, kBits>(weights, codes, scales, weights.outlier_cols[o], weights.outlier_deltas[o]);
  };
  T early{};
  if (first < last) early = restored(first);
  if constexpr (kZeros != Zeros::kAny) {
    for (int32_t c = thread; c - thread % kWarp < weights.chunks; c += step) {  // the same for the whole warp
      write_chunk<T, kBits, kZeros>(weights, codes[c < weights.chunks ? c : weights.chunks - 1], scales, c, to);
    }
  } else {
    constexpr int kOfWord = kPieces<kBits> / 4;
    const bool vector = weights.inputs % kPiece == 0, one_scale = weights.block_cols % kPiece == 0;
    for (int32_t c = thread; c < weights.chunks; c += step) {
      const Chunk chunk = codes[c];
#pragma unroll
      for (int i = 0; i < kPieces<kBits>; ++i) {
        const int32_t k = first_column(kPieces<kBits>, c, i);
        if (k >= weights.inputs) break;
        Piece<T> piece;
        float w[kPiece];
        decode_piece<T, kBits>(weights, chunk.words[i / kOfWord], i % kOfWord, scales, k, one_scale, w);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) piece.values[j] = from_float<T>(w[j]);
        if (vector) {
          *reinterpret_cast<Piece<T>*>(to + k) = piece;
        } else {
#pragma unroll
          for (int j = 0; j < kPiece; ++j) {
            if (k + j < weights.inputs) to[k + j] = piece.values[j];
          }
        }
      }
    }
  }
  __syncthreads();
  for (int32_t o = first; o < last; o += step) to[weights.outlier_cols[o]] = o == first ? early : restored(o);
}

template <typename T, int kBits, Zeros kZeros>
void launch_tiles(const Weights<T>& weights, const T* a, T* y, int32_t rows, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((weights.outputs + kTileOutputs - 1) / kTileOutputs);
  const int32_t quads = weights.chunks / 4;
  const auto block = static_cast<unsigned>(kWarp * (quads < kMostWarps ? quads : kMostWarps));
  if (rows <= kTile) {
    SWQUANT_LAUNCH((linear_tiles<T, kBits, 1, kZeros>), grid, block, stream, weights, a, y, rows);
  } else {
    SWQUANT_LAUNCH((linear_tiles<T, kBits, 2, kZeros>), grid, block, stream, weights, a, y, rows);
  }
}

template <typename T, int kBits>
void launch_warps(const Weights<T>& weights, const T* a, T* y, int32_t rows, cudaStream_t stream) {
  constexpr int kOfBlock = kRowWarps * kRowOutputs;
  const auto grid = static_cast<unsigned>((weights.outputs + kOfBlock - 1) / kOfBlock);
  constexpr unsigned kBlock = kWarp * kRowWarps;
  if (rows == 1) {
    SWQUANT_LAUNCH((linear_rows<T, kBits, 1>), grid, kBlock, stream, weights, a, y, rows);
  } else {
    SWQUANT_LAUNCH((linear_rows<T, kBits, kMostRows>), grid, kBlock, stream, weights, a, y, rows);
  }
}

// Calls body with the bits stored as a constant.
template <typename Body>
void with_bits(int bits, const Body& body) {
  if (bits == 2) body(std::integral_constant<int, 2>{});
  if (bits == 4) body(std::integral_constant<int, 4>{});
  if (bits == 8) body(std::integral_constant<int, 8>{});
}

}  // namespace

// Inputs in whole spans, blocks a power of two from 32 or a whole row, zero points that 16 bits can take off exactly.
template <typename T>
bool is_usual(const Weights<T>& weights) {
  return !std::is_same<T, float>::value && weights.zeros != Zeros::kAny && weights.inputs % kSpan == 0 && weights.block_shift >= 5;
}

// Columns past the last one have to decode to zero, which no code does whose zero point lies between two.
template <typename T>
bool fits_tiles(const Weights<T>& weights) {
  return is_usual(weights) && weights.matrix_units && (weights.zeros != Zeros::kBetween || weights.whole_quads);
}

template <typename T>
int32_t few_rows(const Weights<T>& weights) {
  return fits_tiles(weights) ? 2 * kTile : kMostRows;
}

template <typename T>
cudaError_t launch_rows(const Weights<T>& weights, int bits, const T* a, T* y, int64_t rows, cudaStream_t stream) {
  const int32_t strip = few_rows(weights);
  for (int64_t m = 0; m < rows; m += strip) {
    const auto some = static_cast<int32_t>(rows - m < strip ? rows - m : strip);
    const T* from = a + m * weights.inputs;
    T* to = y + m * weights.outputs;
    with_bits(bits, [&](auto stored) {
      if constexpr (!std::is_same<T, float>::value) {
        if (strip > kMostRows && reinterpret_cast<uintptr_t>(from) % sizeof(Pairs) == 0) {
          switch (weights.zeros) {
            case Zeros::kUsual: return launch_tiles<T, stored, Zeros::kUsual>(weights, from, to, some, stream);
            case Zeros::kCodes: return launch_tiles<T, stored, Zeros::kCodes>(weights, from, to, some, stream);
            default: return launch_tiles<T, stored, Zeros::kBetween>(weights, from, to, some, stream);
          }
        }
      }
      launch_warps<T, stored>(weights, from, to, some, stream);
    });
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_dequantize(const Weights<T>& weights, int bits, T* out, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(weights.outputs);
  const int32_t warps = (weights.chunks + kWarp - 1) / kWarp;
  const auto block = static_cast<unsigned>(kWarp * (warps < kMostWarps ? warps : kMostWarps));
  with_bits(bits, [&](auto stored) {
    if constexpr (!std::is_same<T, float>::value) {
      if (is_usual(weights)) {
        if (weights.zeros == Zeros::kBetween) {
          SWQUANT_LAUNCH((dequantize<T, stored, Zeros::kBetween>), grid, block, stream, weights, out);
        } else {
          SWQUANT_LAUNCH((dequantize<T, stored, Zeros::kCodes>), grid, block, stream, weights, out);
        }
        return;
      }
    }
    SWQUANT_LAUNCH((dequantize<T, stored, Zeros::kAny>), grid, block, stream, weights, out);
  });
  return cudaGetLastError();
}

#define SWQUANT_INSTANTIATE(T)                                                                                   \
  template int32_t few_rows<T>(const Weights<T>&);                                                               \
  template cudaError_t launch_rows<T>(const Weights<T>&, int, const T*, T*, int64_t, cudaStream_t);             \
  template cudaError_t launch_dequantize<T>(const Weights<T>&, int, T*, cudaStream_t);
SWQUANT_INSTANTIATE(float)
SWQUANT_INSTANTIATE(Half)
SWQUANT_INSTANTIATE(Bfloat)

}  // namespace swquant::cuda
