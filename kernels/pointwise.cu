// Elementwise work: activations, embeddings, patches, the position table, the sampler's step,
// pixels and the packing of weights.
//
//   activate            out = act(x)
//   gated_gelu          out[r, c] = gelu_tanh(x[r, c]) · x[r, cols + c]
//   embedding           out[r] = table[ids[r]] (+ positions[r])
//   timestep_embedding  out[r, k] = cos(t·f), out[r, half + k] = sin(t·f), f = 10000^(−k/half)
//   patchify            f32 [t, h, w, c] → tokens [t·h/2·w/2, 4c] of 2×2 patches
//   unpatchify          tokens in (row, column, channel) order → f32 [t, h, w, c]
//   add_position_table  x += the centred crop of the position table, resized bilinearly
//   guided_euler        x += Δσ·(v₀ + g·(v₁ − v₀)), or Δσ·v₀ without guidance
//   rgb8                out = clamp(x·127.5 + 127.5, 0, 255), truncated
//   pack_conv           convolution weights [out, in, tap] → [out, tap, in]
//
// Shapes     matrices [rows, cols] with row strides in elements; the rest contiguous. Sizes of
//            patches and tables are those of the shape checks on the host: even heights, widths and
//            columns of a timestep's embedding, a stage not larger than its table, ids within it.
// Precision  f32 maths, one rounding. Where the result is f32 (guided_euler) or decides an index
//            (add_position_table, rgb8) operations are not contracted, so bits equal the host's.
// Alignment  _v8: pointers 16 bytes, strides and cols multiples of 8. rgb8: x 16 bytes, out 8.
//            Others, and _v1: none.
// Launch     block 256, grid ceil(n / 256) with n the number of vectors (of 8 in _v8 and rgb8, where
//            a last one may be incomplete; else single elements) of the output; for
//            timestep_embedding that of (row, k < cols/2). No shared memory.
//
// One thread handles one 16-byte vector: 2048 threads of a multiprocessor have 32 KB under way,
// about twice what hides the latency of memory, and the grid leaves nothing to tune.
#include "lib/launch.cuh"
#include "lib/types.cuh"

struct ActivateParams {
    const bf16* x;
    bf16* out;
    int64_t rows, ldx, ldo;
    int cols;
    int activation;
};
static_assert(sizeof(ActivateParams) == 48, "as on the host");

struct GatedGeluParams {
    const bf16* x;
    bf16* out;
    int64_t rows, ldx, ldo;
    int cols;
    int pad;
};
static_assert(sizeof(GatedGeluParams) == 48, "as on the host");

struct EmbeddingParams {
    const uint32_t* ids;
    const bf16* table;
    const bf16* positions;
    bf16* out;
    int64_t rows, ldo;
    int cols;
    int pad;
};
static_assert(sizeof(EmbeddingParams) == 56, "as on the host");

struct TimestepParams {
    const float* timesteps;
    bf16* out;
    int64_t rows, ldo;
    int cols;
    int pad;
};
static_assert(sizeof(TimestepParams) == 40, "as on the host");

struct PatchifyParams {
    const float* x;
    bf16* out;
    int frames, height, width, channels;
    int64_t ldo;
    int channels_first;
    int pad;
};
static_assert(sizeof(PatchifyParams) == 48, "as on the host");

struct UnpatchifyParams {
    const bf16* x;
    float* out;
    int frames, height, width, channels;
    int64_t ldx;
};
static_assert(sizeof(UnpatchifyParams) == 40, "as on the host");

struct PositionParams {
    const float* table;
    bf16* x;
    int64_t rows, ldx;
    int cols;
    int max_size;
    int stage_h, stage_w;
    int grid_h, grid_w;
};
static_assert(sizeof(PositionParams) == 56, "as on the host");

struct EulerParams {
    const float* velocity;
    const float* scalars;
    float* x;
    int64_t n;
    int guided;
    int pad;
};
static_assert(sizeof(EulerParams) == 40, "as on the host");

struct Rgb8Params {
    const bf16* x;
    uint8_t* out;
    uint32_t* not_finite;
    int64_t n;
};
static_assert(sizeof(Rgb8Params) == 32, "as on the host");

struct PackConvParams {
    const bf16* weight;
    bf16* out;
    int cout, cin, taps, cin_padded;
    int first, every;
};
static_assert(sizeof(PackConvParams) == 40, "as on the host");

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_index() {
    return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// index = row · per_row + column.
struct Place {
    int64_t row;
    int column;
};

__device__ __forceinline__ Place place_of(int64_t index, int per_row) {
    // A 64-bit division takes longer than everything else that these kernels do.
    if (index <= UINT32_MAX) {
        const uint32_t row = static_cast<uint32_t>(index) / per_row;
        return {row, static_cast<int>(static_cast<uint32_t>(index) - row * per_row)};
    }
    const int64_t row = index / per_row;
    return {row, static_cast<int>(index - row * per_row)};
}

template <int V>
__device__ __forceinline__ void activate_vector(const ActivateParams& p) {
    const Place at = place_of(thread_index(), p.cols / V);
    if (at.row >= p.rows) return;
    const int column = at.column * V;
    const Pack<bf16, V> x = load<V>(p.x + at.row * p.ldx + column);
    Pack<bf16, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = narrow<bf16>(activate(widen(x[i]), p.activation));
    store(p.out + at.row * p.ldo + column, y);
}

template <int V>
__device__ __forceinline__ void gated_gelu_vector(const GatedGeluParams& p) {
    const Place at = place_of(thread_index(), p.cols / V);
    if (at.row >= p.rows) return;
    const int column = at.column * V;
    const bf16* from = p.x + at.row * p.ldx + column;
    const Pack<bf16, V> gate = load<V>(from), value = load<V>(from + p.cols);
    Pack<bf16, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = narrow<bf16>(gelu_tanh(widen(gate[i])) * widen(value[i]));
    store(p.out + at.row * p.ldo + column, y);
}

template <int V>
__device__ __forceinline__ void embedding_vector(const EmbeddingParams& p) {
    const Place at = place_of(thread_index(), p.cols / V);
    if (at.row >= p.rows) return;
    const int column = at.column * V;
    const int64_t entry = p.ids[at.row];
    Pack<bf16, V> y = load<V>(p.table + entry * p.cols + column);
    if (p.positions) {
        const Pack<bf16, V> position = load<V>(p.positions + at.row * p.cols + column);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] = narrow<bf16>(widen(y[i]) + widen(position[i]));
    }
    store(p.out + at.row * p.ldo + column, y);
}

// The two source indices of an output position and the weight of the second, when `from` samples
// are resized to `to` bilinearly with half-pixel centres.
struct Taps {
    int index[2];
    float weight[2];
};

__device__ __forceinline__ Taps bilinear_taps(int i, int from, int to) {
    const float scale = __fdiv_rn(from, to);
    const float source = fmaxf(__fsub_rn(__fmul_rn(__fadd_rn(i, 0.5f), scale), 0.5f), 0.0f);
    const int low = min(static_cast<int>(source), from - 1);
    const float fraction = __fsub_rn(source, low);
    return {{low, min(low + 1, from - 1)}, {__fsub_rn(1.0f, fraction), fraction}};
}

template <int V>
__device__ __forceinline__ void add_position_table_vector(const PositionParams& p) {
    const Place at = place_of(thread_index(), p.cols / V);
    if (at.row >= p.rows) return;
    const int column = at.column * V;
    const Place token = place_of(at.row, p.grid_w);
    const Taps rows = bilinear_taps(token.row % p.grid_h, p.stage_h, p.grid_h);
    const Taps columns = bilinear_taps(token.column, p.stage_w, p.grid_w);
    const int top = (p.max_size - p.stage_h) / 2, left = (p.max_size - p.stage_w) / 2;
    float position[V] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float weight = __fmul_rn(rows.weight[i / 2], columns.weight[i % 2]);
        if (weight == 0.0f) continue;
        const int64_t y = top + rows.index[i / 2], x = left + columns.index[i % 2];
        const float* corner = p.table + (y * p.max_size + x) * p.cols + column;
        constexpr int kStep = V < 4 ? V : 4;
#pragma unroll
        for (int j = 0; j < V; j += kStep) {
            const Pack<float, kStep> part = load<kStep>(corner + j);
#pragma unroll
            for (int k = 0; k < kStep; ++k) {
                position[j + k] = __fadd_rn(position[j + k], __fmul_rn(weight, part[k]));
            }
        }
    }
    bf16* to = p.x + at.row * p.ldx + column;
    Pack<bf16, V> x = load<V>(to);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = narrow<bf16>(widen(x[i]) + position[i]);
    store(to, x);
}

// The rounding of a pixel; NaN gives 0.
__device__ __forceinline__ uint8_t pixel(float x) {
    const float scaled = __fadd_rn(__fmul_rn(x, 127.5f), 127.5f);
    return static_cast<uint8_t>(fminf(fmaxf(scaled, 0.0f), 255.0f));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    activate_v8(const __grid_constant__ ActivateParams p) {
    after_predecessor();
    activate_vector<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    activate_v1(const __grid_constant__ ActivateParams p) {
    after_predecessor();
    activate_vector<1>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gated_gelu_v8(const __grid_constant__ GatedGeluParams p) {
    after_predecessor();
    gated_gelu_vector<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gated_gelu_v1(const __grid_constant__ GatedGeluParams p) {
    after_predecessor();
    gated_gelu_vector<1>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    embedding_v8(const __grid_constant__ EmbeddingParams p) {
    after_predecessor();
    embedding_vector<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    embedding_v1(const __grid_constant__ EmbeddingParams p) {
    after_predecessor();
    embedding_vector<1>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    timestep_embedding(const __grid_constant__ TimestepParams p) {
    after_predecessor();
    const int half = p.cols / 2;
    const Place at = place_of(thread_index(), half);
    if (at.row >= p.rows) return;
    // Angles reach 1000, where the last bit of a frequency shows: the exponential is taken in f64
    // to be that of the host, and the rest is its arithmetic in f32.
    constexpr float kMinusLog10000 = -9.21034049987793f;
    const float exponent = __fdiv_rn(__fmul_rn(kMinusLog10000, at.column), half);
    const float frequency = static_cast<float>(exp(static_cast<double>(exponent)));
    const float angle = __fmul_rn(p.timesteps[at.row], frequency);
    bf16* row = p.out + at.row * p.ldo;
    row[at.column] = narrow<bf16>(cosf(angle));
    row[half + at.column] = narrow<bf16>(sinf(angle));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    patchify(const __grid_constant__ PatchifyParams p) {
    after_predecessor();
    const Place at = place_of(thread_index(), 4 * p.channels);
    // Rows of patches follow each other through the frames, since heights are even.
    const Place patch = place_of(at.row, p.width / 2);
    if (patch.row >= static_cast<int64_t>(p.frames) * (p.height / 2)) return;
    const int corner = p.channels_first ? at.column % 4 : at.column / p.channels;
    const int channel = p.channels_first ? at.column / 4 : at.column % p.channels;
    const int64_t y = patch.row * 2 + corner / 2;
    const int64_t pixel = y * p.width + patch.column * 2 + corner % 2;
    p.out[at.row * p.ldo + at.column] = narrow<bf16>(p.x[pixel * p.channels + channel]);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    unpatchify(const __grid_constant__ UnpatchifyParams p) {
    after_predecessor();
    const int64_t index = thread_index();
    const Place at = place_of(index, p.channels);
    const Place pixel = place_of(at.row, p.width);
    if (pixel.row >= static_cast<int64_t>(p.frames) * p.height) return;
    const int64_t token = pixel.row / 2 * (p.width / 2) + pixel.column / 2;
    const int corner = static_cast<int>(pixel.row % 2) * 2 + pixel.column % 2;
    p.out[index] = widen(p.x[token * p.ldx + corner * p.channels + at.column]);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    add_position_table_v8(const __grid_constant__ PositionParams p) {
    after_predecessor();
    add_position_table_vector<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    add_position_table_v1(const __grid_constant__ PositionParams p) {
    after_predecessor();
    add_position_table_vector<1>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    guided_euler(const __grid_constant__ EulerParams p) {
    after_predecessor();
    const int64_t i = thread_index();
    if (i >= p.n) return;
    const float guidance = p.scalars[0], delta = p.scalars[1];
    float velocity = p.velocity[i];
    if (p.guided) {
        const float difference = __fsub_rn(p.velocity[p.n + i], velocity);
        velocity = __fadd_rn(velocity, __fmul_rn(guidance, difference));
    }
    p.x[i] = __fadd_rn(p.x[i], __fmul_rn(delta, velocity));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    rgb8(const __grid_constant__ Rgb8Params p) {
    after_predecessor();
    constexpr int V = 8;
    const int64_t start = thread_index() * V;
    bool finite = true;
    if (start + V <= p.n) {
        const Pack<bf16, V> x = load<V>(p.x + start);
        Pack<uint8_t, V> y;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            y[i] = pixel(widen(x[i]));
            finite &= isfinite(widen(x[i]));
        }
        store(p.out + start, y);
    } else {
        for (int64_t i = start; i < p.n; ++i) {
            p.out[i] = pixel(widen(p.x[i]));
            finite &= isfinite(widen(p.x[i]));
        }
    }
    if (!finite) *p.not_finite = 1;
}

// Rows first, first + every, … of weight [rows, cin, taps] → out [cout, taps, cin_padded], zero beyond cin.
extern "C" __global__ void __launch_bounds__(kThreads)
    pack_conv(const __grid_constant__ PackConvParams p) {
    after_predecessor();
    const int64_t index = thread_index();
    const Place at = place_of(index, p.cin_padded);
    const Place filter = place_of(at.row, p.taps);
    if (filter.row >= p.cout) return;
    const int64_t row = p.first + filter.row * p.every;
    const int64_t from = (row * p.cin + at.column) * p.taps + filter.column;
    p.out[index] = at.column < p.cin ? p.weight[from] : narrow<bf16>(0.0f);
}
