// Norms over rows:
//   layer_norm            (x − mean) / √(variance + eps) · weight + bias
//   layer_norm_modulate   (x − mean) / √(variance + eps) · (1 + scale) + shift
//   rms_norm              x / √(mean(x²) + eps) · weight
//   head_norm_rope        rms_norm of every head of a row, then a rotation of its pairs
//
// Shapes     x and out [rows, cols] with row strides ldx and ldo; they may be the same memory
//            (then with the same stride). weight, bias [cols]. modulation [samples,
//            ld_modulation] in f32: columns shift_column.. and scale_column.. of the row of the
//            sample that `groups` names. head_norm_rope: x [rows, heads·size], in place; table
//            [rows, size] in f32 holds (cos, sin) of the pair (2k, 2k + 1) at columns 2k, 2k + 1;
//            size is even.
// Precision  bf16 in, f32 maths, one rounding to bf16. The variance is taken about the mean in a
//            second pass over the row, so a large mean does not hide a small variance.
// Alignment  _v8: bf16 pointers 16 bytes, ldx, ldo and cols multiples of 8; the f32 pointer 16
//            bytes, ld_modulation, shift_column and scale_column multiples of 4. _v1: none.
//            head_norm_rope takes its fast path where the size is 64 and everything is aligned so.
// Launch     grid ceil(rows / 4), block 128, no shared memory. layer_norm_modulate and head_norm_rope
//            take a Group, whose units are blocks: ceil(rows / 4) for each problem.
//
// One warp normalizes one row: no barrier, and a row of up to 2048 columns (rms_norm: 4096) stays
// in registers, so that memory is read once and all its loads are under way together. The vectors
// per lane are a template parameter because registers cannot be indexed at run time. Longer rows
// and those of _v1 are read again for each pass, by then from the cache.
#include "lib/group.cuh"
#include "lib/launch.cuh"
#include "lib/reduce.cuh"
#include "lib/types.cuh"

struct LayerNormParams {
    const bf16* x;
    bf16* out;
    const bf16* weight;
    const bf16* bias;
    int64_t rows, ldx, ldo;
    int cols;
    float eps;
};
static_assert(sizeof(LayerNormParams) == 64, "as on the host");

struct ModulateParams {
    const bf16* x;
    bf16* out;
    const float* modulation;
    int64_t rows, ldx, ldo, ld_modulation;
    int cols;
    float eps;
    int shift_column, scale_column;
    RowGroups groups;
    int pad;
};
static_assert(sizeof(ModulateParams) == 144, "as on the host");
using ModulateGroup = Group<ModulateParams, 4>;
static_assert(sizeof(ModulateGroup) == 600, "as on the host");

struct RmsNormParams {
    const bf16* x;
    bf16* out;
    const bf16* weight;
    int64_t rows, ldx, ldo;
    int cols;
    float eps;
};
static_assert(sizeof(RmsNormParams) == 56, "as on the host");

struct HeadNormRopeParams {
    bf16* x;
    const float* table;
    const bf16* weight;
    int64_t rows, ldx, ld_table;
    int heads, size;
    float eps;
    int pad;
};
static_assert(sizeof(HeadNormRopeParams) == 64, "as on the host");
using HeadNormRopeGroup = Group<HeadNormRopeParams, 4>;
static_assert(sizeof(HeadNormRopeGroup) == 280, "as on the host");

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// The row of this warp in a problem whose first block is `first_block`.
__device__ __forceinline__ int64_t row_of_warp(int first_block = 0) {
    return static_cast<int64_t>(blockIdx.x - first_block) * kWarps + threadIdx.x / kWarpSize;
}

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

// N consecutive f32 values; 16 bytes at a time, since wider alignment is not promised.
template <int N>
__device__ __forceinline__ Pack<float, N> load_f32(const float* from) {
    constexpr int kStep = N < 4 ? N : 4;
    Pack<float, N> values;
#pragma unroll
    for (int i = 0; i < N; i += kStep) {
        const Pack<float, kStep> part = load<kStep>(from + i);
#pragma unroll
        for (int j = 0; j < kStep; ++j) values[i + j] = part[j];
    }
    return values;
}

// What follows the division by the deviation: V columns from `column` on.
struct Affine {
    static constexpr bool kCentred = true;
    const bf16* weight;
    const bf16* bias;

    template <int V>
    __device__ __forceinline__ Pack<bf16, V> finish(const Pack<bf16, V>& x, int column, float mean,
                                                    float inverse) const {
        const Pack<bf16, V> w = load<V>(weight + column), b = load<V>(bias + column);
        Pack<bf16, V> y;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            y[i] = narrow<bf16>((widen(x[i]) - mean) * inverse * widen(w[i]) + widen(b[i]));
        }
        return y;
    }
};

struct Modulated {
    static constexpr bool kCentred = true;
    const float* shift;
    const float* scale;

    template <int V>
    __device__ __forceinline__ Pack<bf16, V> finish(const Pack<bf16, V>& x, int column, float mean,
                                                    float inverse) const {
        const Pack<float, V> s = load_f32<V>(scale + column), b = load_f32<V>(shift + column);
        Pack<bf16, V> y;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            y[i] = narrow<bf16>((widen(x[i]) - mean) * inverse * (1.0f + s[i]) + b[i]);
        }
        return y;
    }
};

struct Weighted {
    static constexpr bool kCentred = false;
    const bf16* weight;

    template <int V>
    __device__ __forceinline__ Pack<bf16, V> finish(const Pack<bf16, V>& x, int column, float,
                                                    float inverse) const {
        const Pack<bf16, V> w = load<V>(weight + column);
        Pack<bf16, V> y;
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] = narrow<bf16>(widen(x[i]) * (inverse * widen(w[i])));
        return y;
    }
};

template <int V>
__device__ __forceinline__ float sum_of(const Pack<bf16, V>& x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) sum += widen(x[i]);
    return sum;
}

template <int V>
__device__ __forceinline__ float sum_of_squares(const Pack<bf16, V>& x, float mean) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const float d = widen(x[i]) - mean;
        sum += d * d;
    }
    return sum;
}

// Hides from the compiler that a vector is what it was, so that it widens the vector anew for the
// next pass instead of keeping twice the registers for the f32 values of the last.
__device__ __forceinline__ void keep_narrow(Pack<bf16, 8>& x) {
    uint4& words = reinterpret_cast<uint4&>(x);
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

// A row of at most kVectors·32 vectors, held in registers; those beyond its end stay zero.
template <int kVectors, typename Finish>
__device__ __forceinline__ void normalize_held(const bf16* x, bf16* out, int cols, float eps,
                                               const Finish& finish) {
    constexpr int V = 8;
    const int first = lane_index() * V;
    Pack<bf16, V> held[kVectors] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = first + i * kWarpSize * V;
        if (column < cols) held[i] = load<V>(x + column);
    }
    float mean = 0.0f;
    if constexpr (Finish::kCentred) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) sum += sum_of(held[i]);
        mean = warp_sum(sum) / cols;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) keep_narrow(held[i]);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (first + i * kWarpSize * V < cols) squares += sum_of_squares(held[i], mean);
    }
    const float inverse = rsqrtf(warp_sum(squares) / cols + eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int column = first + i * kWarpSize * V;
        keep_narrow(held[i]);
        if (column < cols) {
            store(out + column, finish.template finish<V>(held[i], column, mean, inverse));
        }
    }
}

// Any row. A lane reads and writes the same columns in every pass, so x may be out.
template <int V, typename Finish>
__device__ __forceinline__ void normalize_reread(const bf16* x, bf16* out, int cols, float eps,
                                                 const Finish& finish) {
    constexpr int kStep = kWarpSize * V;
    const int first = lane_index() * V;
    float mean = 0.0f;
    if constexpr (Finish::kCentred) {
        float sum = 0.0f;
        for (int c = first; c < cols; c += kStep) sum += sum_of(load<V>(x + c));
        mean = warp_sum(sum) / cols;
    }
    float squares = 0.0f;
    for (int c = first; c < cols; c += kStep) squares += sum_of_squares(load<V>(x + c), mean);
    const float inverse = rsqrtf(warp_sum(squares) / cols + eps);
    for (int c = first; c < cols; c += kStep) {
        store(out + c, finish.template finish<V>(load<V>(x + c), c, mean, inverse));
    }
}

template <int V, typename Finish>
__device__ __forceinline__ void normalize(const bf16* x, bf16* out, int cols, float eps,
                                          const Finish& finish) {
    if constexpr (V == 8) {
        switch ((cols + kWarpSize * V - 1) / (kWarpSize * V)) {
            case 1: return normalize_held<1>(x, out, cols, eps, finish);
            case 2: return normalize_held<2>(x, out, cols, eps, finish);
            case 3: return normalize_held<3>(x, out, cols, eps, finish);
            case 4: return normalize_held<4>(x, out, cols, eps, finish);
            case 5: return normalize_held<5>(x, out, cols, eps, finish);
            case 6: return normalize_held<6>(x, out, cols, eps, finish);
            case 7:
            case 8: return normalize_held<8>(x, out, cols, eps, finish);
        }
        // Rows so long are T5's, whose norms are not centred; the others would lose occupancy
        // to the registers of a case that they never meet.
        if constexpr (!Finish::kCentred) {
            if (cols <= 16 * kWarpSize * V) return normalize_held<16>(x, out, cols, eps, finish);
        }
    }
    normalize_reread<V>(x, out, cols, eps, finish);
}

template <int V>
__device__ __forceinline__ void layer_norm(const LayerNormParams& p) {
    const int64_t row = row_of_warp();
    if (row >= p.rows) return;
    const Affine finish{p.weight, p.bias};
    normalize<V>(p.x + row * p.ldx, p.out + row * p.ldo, p.cols, p.eps, finish);
}

template <int V>
__device__ __forceinline__ void layer_norm_modulate(const ModulateGroup& group) {
    const int which = group.of(blockIdx.x);
    const ModulateParams& p = group.problem[which];
    const int64_t row = row_of_warp(group.first[which]);
    if (row >= p.rows) return;
    const int sample = p.groups.sample_of(static_cast<int>(row));
    const float* vectors = p.modulation + sample * p.ld_modulation;
    const Modulated finish{vectors + p.shift_column, vectors + p.scale_column};
    normalize<V>(p.x + row * p.ldx, p.out + row * p.ldo, p.cols, p.eps, finish);
}

template <int V>
__device__ __forceinline__ void rms_norm(const RmsNormParams& p) {
    const int64_t row = row_of_warp();
    if (row >= p.rows) return;
    const Weighted finish{p.weight};
    normalize<V>(p.x + row * p.ldx, p.out + row * p.ldo, p.cols, p.eps, finish);
}

// Heads of kLanes vectors of 8 columns. A lane has the same columns of every head it meets, so
// it loads its part of the table and of the weight once for the row.
template <int kLanes>
__device__ __forceinline__ void head_norm_rope_vectors(const HeadNormRopeParams& p, bf16* x,
                                                       const float* table) {
    constexpr int V = 8;
    constexpr int kSize = kLanes * V;
    constexpr int kHeads = kWarpSize / kLanes;  // that the warp has at once
    constexpr int kBatch = 4;                   // vectors of a lane under way together
    const int column = lane_index() % kLanes * V;
    const int first = lane_index() / kLanes;
    const Pack<float, V> rotation = load_f32<V>(table + column);
    const Pack<bf16, V> weight = load<V>(p.weight + column);
    for (int base = 0; base < p.heads; base += kBatch * kHeads) {
        Pack<bf16, V> values[kBatch] = {};
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int head = base + i * kHeads + first;
            if (head < p.heads) values[i] = load<V>(x + head * kSize + column);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const float squares = warp_sum<kLanes>(sum_of_squares(values[i], 0.0f));
            const float inverse = rsqrtf(squares / kSize + p.eps);
#pragma unroll
            for (int k = 0; k < V; k += 2) {
                const float a = widen(values[i][k]) * inverse * widen(weight[k]);
                const float b = widen(values[i][k + 1]) * inverse * widen(weight[k + 1]);
                const float cos = rotation[k], sin = rotation[k + 1];
                values[i][k] = narrow<bf16>(a * cos - b * sin);
                values[i][k + 1] = narrow<bf16>(a * sin + b * cos);
            }
            const int head = base + i * kHeads + first;
            if (head < p.heads) store(x + head * kSize + column, values[i]);
        }
    }
}

// Any even size, one head after the other.
__device__ __forceinline__ void head_norm_rope_pairs(const HeadNormRopeParams& p, bf16* x,
                                                     const float* table) {
    for (int head = 0; head < p.heads; ++head, x += p.size) {
        float squares = 0.0f;
        for (int c = lane_index() * 2; c < p.size; c += kWarpSize * 2) {
            const float a = widen(x[c]), b = widen(x[c + 1]);
            squares += a * a + b * b;
        }
        const float inverse = rsqrtf(warp_sum(squares) / p.size + p.eps);
        for (int c = lane_index() * 2; c < p.size; c += kWarpSize * 2) {
            const float a = widen(x[c]) * inverse * widen(p.weight[c]);
            const float b = widen(x[c + 1]) * inverse * widen(p.weight[c + 1]);
            const float cos = table[c], sin = table[c + 1];
            x[c] = narrow<bf16>(a * cos - b * sin);
            x[c + 1] = narrow<bf16>(a * sin + b * cos);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    layer_norm_v8(const __grid_constant__ LayerNormParams p) {
    after_predecessor();
    layer_norm<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    layer_norm_v1(const __grid_constant__ LayerNormParams p) {
    after_predecessor();
    layer_norm<1>(p);
}

// Seven blocks on a multiprocessor: left to itself the compiler saves registers for an eighth, and spills.
extern "C" __global__ void __launch_bounds__(kThreads, 7)
    layer_norm_modulate_v8(const __grid_constant__ ModulateGroup group) {
    after_predecessor();
    layer_norm_modulate<8>(group);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    layer_norm_modulate_v1(const __grid_constant__ ModulateGroup group) {
    after_predecessor();
    layer_norm_modulate<1>(group);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_v8(const __grid_constant__ RmsNormParams p) {
    after_predecessor();
    rms_norm<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_v1(const __grid_constant__ RmsNormParams p) {
    after_predecessor();
    rms_norm<1>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    head_norm_rope(const __grid_constant__ HeadNormRopeGroup group) {
    after_predecessor();
    constexpr int kFastLanes = 8;
    const int which = group.of(blockIdx.x);
    const HeadNormRopeParams& p = group.problem[which];
    const int64_t row = row_of_warp(group.first[which]);
    if (row >= p.rows) return;
    bf16* x = p.x + row * p.ldx;
    const float* table = p.table + row * p.ld_table;
    const auto addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.table) |
                           reinterpret_cast<uintptr_t>(p.weight);
    const bool aligned = addresses % 16 == 0 && p.ldx % 8 == 0 && p.ld_table % 4 == 0;
    if (p.size == kFastLanes * 8 && aligned) {
        head_norm_rope_vectors<kFastLanes>(p, x, table);
    } else {
        head_norm_rope_pairs(p, x, table);
    }
}
