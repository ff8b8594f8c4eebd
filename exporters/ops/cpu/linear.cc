// What happens around the inner loops: rounding A, sharing the work among the runtime's threads, and the corrections in
// float32 (channels, outliers, bias) while a tile of Y is still in the cache.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../floats.h"
#include "../node.h"
#include "kernels.h"

namespace swquant::cpu {
namespace {

constexpr int64_t kRows = 64;     // rows of A that a task multiplies with all of its groups
constexpr int64_t kPanel = kPiece;  // columns that are dequantized at a time: 16 KiB
constexpr int64_t kTask = 1 << 17;  // multiplications below which a thread is not worth waking
constexpr int64_t kTasks = 64;      // per strip: enough for every thread, few enough to cost nothing
constexpr int64_t kAcross = 8;      // rows of A from which an outlier is multiplied with all of them at a time

struct Outlier {
  int32_t lane, col;
  float delta;
};

// One call, and what is made of A before it meets the weights.
struct Call {
  const ort::KernelContext* context;
  Activations in;
  const float* floats = nullptr;  // [rows][stride], at level 0: A itself, or `copy`
  Buffer<float> copy;
  Buffer<int8_t> q;      // [rows][padded], at level 4
  Buffer<float> scales;  // [rows][pieces], PieceScale
  Buffer<float> across;  // A by column, [strips][K][kRows], where many rows meet outliers

  PieceScale* piece_scales() const { return reinterpret_cast<PieceScale*>(scales.get()); }
};

}  // namespace

struct Linear::State {
  const ort::Api* api;
  std::string node;
  ort::Type type;
  bool int8;
  const Kernels* kernels;
  Layout layout;
  std::vector<int64_t> first_outlier;  // [groups + 1]
  std::vector<Outlier> outliers;
  std::vector<int32_t> channels;
  Buffer<float> channel_weights;  // [groups][channels][16]
  Buffer<float> bias;             // [groups][16], or none

  State(const ort::Api* api, const ort::KernelInfo* info, ort::Type type);
  void decode_channels();
  void read(const void* a, int64_t row, float* to, float* plain) const;
  void add_outliers(const Call& call, int64_t group, int64_t m, int64_t rows, float* y) const;
  void tile(const Call& call, int64_t group, int64_t m, int64_t rows, float* panel, float* y) const;
  void read_all(Call& call) const;
  void lay_across(Call& call) const;
  void multiply_all(const Call& call) const;

  int64_t pieces() const { return static_cast<int64_t>(layout.pieces.size()); }
  // Floats between rows: those that lie a power of two apart would fight for the same few lines of the first cache.
  int64_t stride() const { return layout.padded + 16; }
};

Linear::State::State(const ort::Api* api, const ort::KernelInfo* info, ort::Type type)
    : api(api), node(node_name(api, info)), type(type), kernels(&cpu::kernels()) {
  const Weights weights = read_weights(api, info, type);
  int8 = weights.int8;
  layout = interleave(weights);
  first_outlier.assign(static_cast<size_t>(layout.groups + 1), 0);
  for (size_t i = 0; i < weights.outlier_rows.size(); ++i) {
    const int32_t row = weights.outlier_rows[i];
    outliers.push_back({row % kGroup, weights.outlier_cols[i], weights.outlier_deltas[i]});
    ++first_outlier[static_cast<size_t>(row / kGroup + 1)];
  }
  for (size_t group = 1; group < first_outlier.size(); ++group) {
    first_outlier[group] += first_outlier[group - 1];
    // By column: a sum that is added to again and again would wait for itself every time.
    std::stable_sort(outliers.begin() + first_outlier[group - 1], outliers.begin() + first_outlier[group],
                     [](const Outlier& one, const Outlier& other) { return one.col < other.col; });
  }
  if (int8) channels = weights.channels;  // in float32 arithmetic they change nothing
  decode_channels();
  if (!weights.bias.empty()) {
    bias = allocate<float>(layout.groups * kGroup);
    std::fill_n(bias.get(), layout.groups * kGroup, 0.0f);
    std::copy(weights.bias.begin(), weights.bias.end(), bias.get());
  }
}

// Ŵ of the channels, without outliers, which are added for every column.
void Linear::State::decode_channels() {
  const auto count = static_cast<int64_t>(channels.size());
  channel_weights = allocate<float>(layout.groups * count * kGroup);
  alignas(64) float panel[kPanel * kGroup];
  for (int64_t c = 0; c < count; ++c) {
    const int32_t channel = channels[static_cast<size_t>(c)];
    const auto after = std::upper_bound(layout.pieces.begin(), layout.pieces.end(), channel,
                                        [](int32_t column, const Piece& piece) { return column < piece.start; });
    const int64_t p = after - layout.pieces.begin() - 1;
    const int64_t column = channel - layout.pieces[static_cast<size_t>(p)].start;
    for (int64_t group = 0; group < layout.groups; ++group) {
      kernels->dequantize(layout, group, p, p + 1, panel);
      std::copy_n(panel + column * kGroup, kGroup, channel_weights.get() + (group * count + c) * kGroup);
    }
  }
}

// Row `row` of A as float32, channels taken out, into the padded columns `to`. `plain`: [inputs], scratch.
void Linear::State::read(const void* a, int64_t row, float* to, float* plain) const {
  if (layout.padded == layout.inputs) plain = to;  // pieces lie side by side
  if (type == ort::kFloat) {
    std::memcpy(plain, static_cast<const float*>(a) + row * layout.inputs, static_cast<size_t>(layout.inputs) * 4);
  } else {
    for (int64_t k = 0; k < layout.inputs; ++k) plain[k] = load(type, a, row * layout.inputs + k);
  }
  for (int32_t channel : channels) plain[channel] = 0.0f;
  if (plain == to) return;
  if (layout.padded != layout.inputs) std::memset(to, 0, static_cast<size_t>(layout.padded) * 4);
  for (const Piece& piece : layout.pieces) {
    std::memcpy(to + piece.offset, plain + piece.start, static_cast<size_t>(piece.length) * 4);
  }
}

// The outliers of a group to y[rows][16], for rows m … of A.
void Linear::State::add_outliers(const Call& call, int64_t group, int64_t m, int64_t rows, float* y) const {
  const Outlier* first = outliers.data() + first_outlier[static_cast<size_t>(group)];
  const Outlier* end = outliers.data() + first_outlier[static_cast<size_t>(group + 1)];
  if (first == end) return;
  if (call.across) {
    const float* across = call.across.get() + m * layout.inputs;
    alignas(64) float sums[kGroup][kRows] = {};
    for (const Outlier* outlier = first; outlier != end; ++outlier) {
      const float* x = across + outlier->col * kRows;
      float* sum = sums[outlier->lane];
      for (int64_t i = 0; i < kRows; ++i) sum[i] += x[i] * outlier->delta;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int r = 0; r < kGroup; ++r) y[i * kGroup + r] += sums[r][i];
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i, y += kGroup) {
    const int64_t at = (m + i) * layout.inputs;
    if (type == ort::kFloat) {
      const float* x = static_cast<const float*>(call.in.a) + at;
      for (const Outlier* outlier = first; outlier != end; ++outlier) y[outlier->lane] += x[outlier->col] * outlier->delta;
    } else {
      for (const Outlier* outlier = first; outlier != end; ++outlier) {
        y[outlier->lane] += load(type, call.in.a, at + outlier->col) * outlier->delta;
      }
    }
  }
}

// y[rows][16] of one group, for rows m … of A.
void Linear::State::tile(const Call& call, int64_t group, int64_t m, int64_t rows, float* panel, float* y) const {
  if (int8) {
    const PieceScale* scales = call.piece_scales() + m * pieces();
    kernels->multiply_int8(layout, group, call.q.get() + m * layout.padded, scales, rows, y);
  } else {
    std::memset(y, 0, static_cast<size_t>(rows * kGroup) * 4);
    for (int64_t first = 0; first < pieces();) {
      const int64_t start = layout.pieces[static_cast<size_t>(first)].offset;
      int64_t last = first, columns = 0;
      for (; last < pieces(); ++last) {
        const int64_t more = layout.pieces[static_cast<size_t>(last)].units * layout.unit_columns();
        if (last > first && columns + more > kPanel) break;
        columns += more;
      }
      kernels->dequantize(layout, group, first, last, panel);
      kernels->multiply(panel, columns, call.floats + m * stride() + start, stride(), rows, y);
      first = last;
    }
  }
  add_outliers(call, group, m, rows, y);
  const float* extra = channel_weights.get() + group * static_cast<int64_t>(channels.size()) * kGroup;
  for (int64_t i = 0; i < rows; ++i, y += kGroup) {
    const int64_t at = (m + i) * layout.inputs;
    for (size_t c = 0; c < channels.size(); ++c) {
      const float x = load(type, call.in.a, at + channels[c]);
      for (int r = 0; r < kGroup; ++r) y[r] += x * extra[static_cast<int64_t>(c) * kGroup + r];
    }
    if (bias) {
      for (int r = 0; r < kGroup; ++r) y[r] += bias[static_cast<size_t>(group * kGroup + r)];
    }
  }
}

namespace {

// The runtime's thread pool calls `body(index)` for 0 … count − 1. The first exception ends up in the caller.
// Memory is taken before, where running out of it can still be reported.
template <typename Body>
void parallel(const ort::Api* api, const ort::KernelContext* context, int64_t count, const Body& body) {
  if (count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  check(api, ort::ParallelFor(api, context,
                              [](void* data, size_t i) { (*static_cast<const Body*>(data))(static_cast<int64_t>(i)); },
                              static_cast<size_t>(count), 0, const_cast<Body*>(&body)));
}

int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

// A for the product: as float32 at level 0, rounded to int8 at level 4.
void Linear::State::read_all(Call& call) const {
  const int64_t rows = call.in.rows, padded = layout.padded;
  if (!int8 && type == ort::kFloat && rows == 1 && padded == layout.inputs) {
    call.floats = static_cast<const float*>(call.in.a);
    return;
  }
  call.floats = (call.copy = allocate<float>(int8 ? 0 : rows * stride())).get();
  call.q = allocate<int8_t>(int8 ? rows * padded : 0);
  call.scales = allocate<float>(int8 ? rows * pieces() * 2 : 0);
  const int64_t share = std::max(ceil_divide(kTask / 8, padded), ceil_divide(rows, kTasks));
  const int64_t readers = ceil_divide(rows, share);
  const int64_t room = layout.inputs + (int8 ? padded : 0);
  Buffer<float> temporary = allocate<float>(readers * room);
  parallel(api, call.context, readers, [&](int64_t reader) {
    float* plain = temporary.get() + reader * room;
    for (int64_t m = reader * share; m < std::min(rows, (reader + 1) * share); ++m) {
      float* to = int8 ? plain + layout.inputs : call.copy.get() + m * stride();
      read(call.in.a, m, to, plain);
      if (int8) kernels->quantize(layout, to, call.q.get() + m * padded, call.piece_scales() + m * pieces());
    }
  });
}

// A by column for the outliers, zeros below its last row; nothing where rows are few.
void Linear::State::lay_across(Call& call) const {
  const int64_t rows = call.in.rows, strips = ceil_divide(rows, kRows);
  if (rows < kAcross || outliers.empty()) return;
  call.across = allocate<float>(strips * layout.inputs * kRows);
  const int64_t share = std::max(ceil_divide(kTask / 8, kRows), ceil_divide(layout.inputs, kTasks));  // columns
  const int64_t shares = ceil_divide(layout.inputs, share);
  parallel(api, call.context, strips * shares, [&](int64_t task) {
    const int64_t m = task / shares * kRows, count = std::min(kRows, rows - m), begin = task % shares * share;
    for (int64_t k = begin; k < std::min(layout.inputs, begin + share); ++k) {
      float* to = call.across.get() + m * layout.inputs + k * kRows;
      for (int64_t i = 0; i < kRows; ++i) to[i] = i < count ? load(type, call.in.a, (m + i) * layout.inputs + k) : 0.0f;
    }
  });
}

// Y, in tasks of one strip of A and some groups of weights.
void Linear::State::multiply_all(const Call& call) const {
  const int64_t rows = call.in.rows;
  const int64_t group_work = std::min(rows, kRows) * layout.padded * kGroup;
  const int64_t per_task = std::max(ceil_divide(kTask, group_work), ceil_divide(layout.groups, kTasks));  // groups
  const int64_t chunks = ceil_divide(layout.groups, per_task);
  parallel(api, call.context, chunks * ceil_divide(rows, kRows), [&](int64_t task) {
    alignas(64) float panel[kPanel * kGroup], tile_y[kRows * kGroup];
    const int64_t m = task / chunks * kRows, count = std::min(kRows, rows - m);
    const int64_t begin = task % chunks * per_task, end = std::min(layout.groups, begin + per_task);
    for (int64_t group = begin; group < end; ++group) {
      tile(call, group, m, count, panel, tile_y);
      const int64_t n = group * kGroup;
      const auto width = static_cast<int>(std::min<int64_t>(kGroup, layout.outputs - n));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t to = (m + i) * layout.outputs + n;
        if (type == ort::kFloat) {
          std::memcpy(static_cast<float*>(call.in.y) + to, tile_y + i * kGroup, static_cast<size_t>(width) * 4);
        } else {
          for (int r = 0; r < width; ++r) store(type, call.in.y, to + r, tile_y[i * kGroup + r]);
        }
      }
    }
  });
}

Linear::Linear(const ort::Api* api, const ort::KernelInfo* info, ort::Type type)
    : state_(std::make_unique<State>(api, info, type)) {}
Linear::~Linear() = default;

void Linear::compute(ort::KernelContext* context) const {
  const State& state = *state_;
  Call call{context, read_activations(state.api, context, state.node, state.layout.inputs, state.layout.outputs)};
  if (!call.in.rows) return;
  state.read_all(call);
  state.lay_across(call);
  state.multiply_all(call);
}

}  // namespace swquant::cpu
