// What happens to the sums of a matrix product on their way to memory: bias, activation, gate,
// accumulation, residual, depth-to-space. Shared by every product and convolution kernel, so it
// knows nothing of tiles: a caller hands over N neighbouring columns of one row.
//
//   const LinearEpilogue<GemmParams> epilogue(p);    // or ConvEpilogue<ConvParams>
//   epilogue.finish(row, column, sums);              // float (&sums)[N]
//
// or, to have the loads of many rows under way before the first store, in three parts: bias(),
// prior() and store(). N is 2 (a pair, as fragments hold them) or 8 (16 bytes of bf16);
// `column` is a multiple of N. Rows and columns outside of the output are skipped, so a caller
// need not mask tails.
//
// Any struct with the fields of GemmParams or ConvParams serves as parameters.
#pragma once

#include "types.cuh"

// What a linear layer does with its result; values are those of the enum on the host.
enum LinearResult : int { kStore = 0, kAccumulate = 1, kGatedAccumulate = 2 };

// Where a convolution's channels go; values are those of the enum on the host.
enum Shuffle : int { kInPlace = 0, kToSpace = 1, kToTime = 2, kToTimeDropFirst = 3 };

__device__ __forceinline__ bool is_aligned(const void* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <int kActivation, int N>
__device__ __forceinline__ void activate_each(float (&values)[N]) {
    if constexpr (kActivation == kGeluTanh && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) gelu_tanh_pair(values[i], values[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = activate(values[i], kActivation);
    }
}

// One branch for all values instead of one for each.
template <int N>
__device__ __forceinline__ void activate_all(float (&values)[N], int activation) {
    switch (activation) {
        case kSilu: return activate_each<kSilu>(values);
        case kGeluTanh: return activate_each<kGeluTanh>(values);
        case kGeluErf: return activate_each<kGeluErf>(values);
        case kQuickGelu: return activate_each<kQuickGelu>(values);
        default: return;
    }
}

// N biases from `column` on, zero where there are none.
template <int N>
__device__ __forceinline__ Pack<float, N> load_bias(const bf16* bias, int column, int columns) {
    Pack<float, N> values = {};
    if (bias == nullptr) return values;
    if (column + N <= columns && is_aligned(bias + column, N * sizeof(bf16))) {
        const Pack<bf16, N> pack = load<N>(bias + column);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = widen(pack[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (column + i < columns) values[i] = widen(bias[column + i]);
        }
    }
    return values;
}

// The four lanes of a quad hold columns 2q and 2q + 1 of four groups of eight columns
// (values[2g] and [2g + 1] of group g), as the fragments of mma and wgmma do; afterwards lane q
// holds the eight columns of group q. All lanes of the warp must take part.
__device__ __forceinline__ void transpose_quad(float (&values)[8]) {
    const int q = threadIdx.x % 4;
    // For each bit of q: what lies in groups that differ from q in that bit goes to the lane
    // that differs in it.
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (q & bit) != 0;
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            if ((group & bit) != 0) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& low = values[2 * group + i];
                float& high = values[2 * (group | bit) + i];
                const float received = __shfl_xor_sync(~0u, upper ? low : high, bit);
                low = upper ? received : low;
                high = upper ? high : received;
            }
        }
    }
}

// out = act(x + bias), out += x + bias or out += gate·(x + bias); see gemm.cu.
template <typename Params>
class LinearEpilogue {
public:
    __device__ __forceinline__ explicit LinearEpilogue(const Params& params) : p(params) {
        aligned = is_aligned(p.out, 16) && p.ldo % 8 == 0;
        if (p.epilogue == kGatedAccumulate) {
            aligned = aligned && is_aligned(p.gate, 16) && p.ld_gate % 4 == 0;
        }
    }

    template <int N>
    __device__ __forceinline__ Pack<float, N> bias(int column) const {
        return load_bias<N>(p.bias, column, p.n);
    }

    // The output so far where it is added to; what cannot be read in one piece is left to store.
    template <int N>
    __device__ __forceinline__ Pack<bf16, N> prior(int row, int column) const {
        Pack<bf16, N> old = {};
        if (p.epilogue != kStore && !p.out_f32 && row < p.m && in_one_piece<N>(column)) {
            old = load<N>(static_cast<const bf16*>(p.out) + offset(row, column));
        }
        return old;
    }

    template <int N>
    __device__ __forceinline__ void store(int row, int column, const float (&sums)[N],
                                          const Pack<float, N>& bias,
                                          const Pack<bf16, N>& prior) const {
        if (row >= p.m || column >= p.n) return;
        float values[N];
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = sums[i] + bias[i];
        if (p.epilogue == kStore) activate_all(values, p.activation);

        if (!in_one_piece<N>(column)) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (column + i < p.n) store_one(row, column + i, values[i]);
            }
            return;
        }
        if (p.epilogue == kGatedAccumulate) {
            constexpr int kWide = N < 4 ? N : 4;
            const float* gates = gate_of(row) + column;
#pragma unroll
            for (int i = 0; i < N; i += kWide) {
                const Pack<float, kWide> gate = load<kWide>(gates + i);
#pragma unroll
                for (int j = 0; j < kWide; ++j) values[i + j] *= gate[j];
            }
        }
        if (p.out_f32) {
            store_f32(static_cast<float*>(p.out) + offset(row, column), values);
        } else {
            // `prior` is zero where nothing is added to.
            Pack<bf16, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) out[i] = narrow<bf16>(widen(prior[i]) + values[i]);
            ::store(static_cast<bf16*>(p.out) + offset(row, column), out);
        }
    }

    template <int N>
    __device__ __forceinline__ void finish(int row, int column, const float (&sums)[N]) const {
        store(row, column, sums, bias<N>(column), prior<N>(row, column));
    }

private:
    template <int N>
    __device__ __forceinline__ bool in_one_piece(int column) const {
        return aligned && column + N <= p.n;
    }

    __device__ __forceinline__ int64_t offset(int row, int column) const {
        return row * p.ldo + column;
    }

    __device__ __forceinline__ const float* gate_of(int row) const {
        return p.gate + p.groups.sample_of(row) * p.ld_gate;
    }

    template <int N>
    __device__ __forceinline__ void store_f32(float* to, const float (&values)[N]) const {
        constexpr int kWide = N < 4 ? N : 4;
#pragma unroll
        for (int i = 0; i < N; i += kWide) {
            Pack<float, kWide> out = {};
            if (p.epilogue != kStore) out = load<kWide>(to + i);
#pragma unroll
            for (int j = 0; j < kWide; ++j) out[j] += values[i + j];
            ::store(to + i, out);
        }
    }

    __device__ __forceinline__ void store_one(int row, int column, float value) const {
        if (p.epilogue == kGatedAccumulate) value *= gate_of(row)[column];
        const int64_t at = offset(row, column);
        if (p.out_f32) {
            float* out = static_cast<float*>(p.out);
            out[at] = p.epilogue == kStore ? value : out[at] + value;
        } else {
            bf16* out = static_cast<bf16*>(p.out);
            out[at] = narrow<bf16>(p.epilogue == kStore ? value : widen(out[at]) + value);
        }
    }

    const Params& p;
    bool aligned;  // whether runs of columns may be moved in one piece
};

// out = x + bias (+ residual), each channel at its place after the shuffle; see conv3d.cu.
// A row is a position of the kernel, (t·out_height + y)·out_width + x, a column a channel
// before the shuffle. The shuffle deals the channels out in turn to `split` pixels; with N = 8
// each of these gets its neighbouring channels in one store, with N = 2 they are stored singly.
template <typename Params>
class ConvEpilogue {
public:
    __device__ __forceinline__ explicit ConvEpilogue(const Params& params) : p(params) {
        rows = p.out_frames * p.out_height * p.out_width;
        shift = p.shuffle == kInPlace ? 0 : p.shuffle == kToSpace ? 2 : 1;
        channels = p.cout >> shift;
        unit = p.shuffle == kToSpace ? p.out_width : p.out_height * p.out_width;
    }

    template <int N>
    __device__ __forceinline__ Pack<float, N> bias(int column) const {
        return load_bias<N>(p.bias, column, p.cout);
    }

    // The residual of channels that stay together; others are left to store.
    template <int N>
    __device__ __forceinline__ Pack<bf16, N> prior(int row, int column) const {
        Pack<bf16, N> old = {};
        const bool inside = row < rows && column < p.cout;
        if (p.residual != nullptr && inside && shift == 0 && in_pieces<N>()) {
            old = load<N>(p.residual + static_cast<int64_t>(row) * p.cout + column);
        }
        return old;
    }

    template <int N>
    __device__ __forceinline__ void store(int row, int column, const float (&sums)[N],
                                          const Pack<float, N>& bias,
                                          const Pack<bf16, N>& prior) const {
        if (row >= rows || column >= p.cout) return;
        Pack<float, N> values;
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = sums[i] + bias[i];
        if (in_pieces<N>() && shift == 0) {
            Pack<bf16, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) out[i] = narrow<bf16>(widen(prior[i]) + values[i]);
            ::store(p.out + static_cast<int64_t>(row) * p.cout + column, out);
            return;
        }
        const int pixel = first_pixel(row);
        if constexpr (N == 8) {
            if (in_pieces<N>()) return deal(pixel, column, values);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (column + i < p.cout) store_piece(pixel, column + i, Pack<float, 1>{values[i]});
        }
    }

    template <int N>
    __device__ __forceinline__ void finish(int row, int column, const float (&sums)[N]) const {
        store(row, column, sums, bias<N>(column), prior<N>(row, column));
    }

private:
    // With a multiple of 8 channels every piece is whole and aligned to its size.
    template <int N>
    __device__ __forceinline__ bool in_pieces() const {
        return p.cout % 8 == 0 && (N == 8 || shift == 0);
    }

    // Where the first of the pixels goes that a position becomes.
    __device__ __forceinline__ int first_pixel(int row) const {
        if (shift == 0) return row;
        const int before = row / unit * unit;  // what lies in the lines or frames before
        if (p.shuffle == kToSpace) return 2 * (row + before);
        return row + before - (p.shuffle == kToTimeDropFirst ? unit : 0);
    }

    __device__ __forceinline__ void deal(int pixel, int column, const Pack<float, 8>& v) const {
        if (p.shuffle == kToSpace) {
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                store_piece(pixel, column + s, Pack<float, 2>{v[s], v[s + 4]});
            }
        } else {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                store_piece(pixel, column + s, Pack<float, 4>{v[s], v[s + 2], v[s + 4], v[s + 6]});
            }
        }
    }

    // Channels that stay together, the first being `column` before the shuffle, with the
    // residual at their place. Pixels below zero are those of the frame left out.
    template <int N>
    __device__ __forceinline__ void store_piece(int pixel, int column,
                                                Pack<float, N> values) const {
        if (p.shuffle == kToSpace) {
            pixel += (column & 2) * unit + (column & 1);
        } else if (shift == 1) {
            pixel += (column & 1) * unit;
            if (pixel < 0) return;
        }
        const int64_t at = static_cast<int64_t>(pixel) * channels + (column >> shift);
        if (p.residual != nullptr) {
            const Pack<bf16, N> add = load<N>(p.residual + at);
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] += widen(add[i]);
        }
        Pack<bf16, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = narrow<bf16>(values[i]);
        ::store(p.out + at, out);
    }

    const Params& p;
    int rows;
    int shift;     // of a column to its channel: log2 of the number of pixels dealt out to
    int channels;  // of the output
    int unit;      // pixels of the line or frame that is doubled
};
