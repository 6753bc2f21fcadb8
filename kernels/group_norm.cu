// Group norm with the statistics of one frame, and SiLU after it if asked:
//   out = (x − mean) / √(variance + eps) · weight + bias, then out · σ(out)
// mean and variance over the pixels of a frame and the channels/groups channels of a group.
//
// Shapes     x, out [frames, pixels, channels] contiguous, may be the same memory; weight, bias
//            [channels]. groups divides channels; up to 1024 channels.
// Precision  bf16 in, f32 maths, one rounding to bf16. Statistics are merged as (mean, sum of
//            squares about it) of ever larger sets (Chan, Golub, LeVeque 1983), never as a sum of
//            squares, so nothing cancels; means are kept relative to a pivot, one value of the
//            group, so that a large mean does not use up their digits.
// Alignment  _v8: x, out, weight, bias 16 bytes, channels a multiple of 8. group_norm_sums takes
//            its wide path where that holds. _v1: none.
// Launch     group_norm_sums    grid (chunks, frames), block 256, 17 KB of static shared memory
//            group_norm_finish  grid frames, block 256
//            group_norm_apply_* grid (chunks, frames), block 256
//            A frame is cut into `chunks` = ceil(pixels / chunk_pixels) runs of pixels, none empty.
//            With T = max(1, 256 / (channels / 8)), 8·T pixels give each thread of a block one
//            batch; chunk_pixels is best 8·T times
//            clamp(2 · ceil(pixels / (8·T)) / (8 · multiprocessors), 1, 16).
// Workspace  8 · frames · groups · (chunks + 1) bytes, aligned to 8: pairs (mean about the pivot,
//            centred squares) [frames, groups, chunks], then pairs (mean, 1/deviation)
//            [frames, groups].
//
// A thread keeps to the same vector of channels all along a chunk, so the statistics of channels
// and the affine map stay in registers and a group may have any number of channels. It takes
// eight pixels at a time: eight loads under way, and an exact two-pass mean and variance of
// them without another read.
#include "lib/launch.cuh"
#include "lib/reduce.cuh"
#include "lib/types.cuh"

struct GroupNormParams {
    const bf16* x;
    bf16* out;
    const bf16* weight;
    const bf16* bias;
    float* workspace;
    int64_t pixels;
    int frames, channels, groups, chunks;
    int64_t chunk_pixels;
    float eps;
    int silu;
};
static_assert(sizeof(GroupNormParams) == 80, "as on the host");

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Pixels that a thread takes at once, where statistics are gathered and where they are applied.
constexpr int kSumBatch = 8;
constexpr int kApplyBatch = 4;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarpSize; }

// Statistics of some values: their mean (about the pivot) and the sum of squares about it.
struct alignas(8) Moments {
    float mean, squares;
};

// The chunk of this block and how its threads share it: thread t has vectors t % lanes, and the
// pixels t / lanes, t / lanes + rows, … . Where there are more vectors than threads, lanes is
// less than their number and the block goes over the chunk several times.
template <int V>
struct Chunk {
    int64_t first;   // pixel in the whole tensor
    int64_t pixels;
    int vectors;     // of a pixel
    int lanes, rows;
    int lane, row;   // of this thread; row ≥ rows for those left over
    int64_t mine;    // pixels of this thread

    __device__ __forceinline__ explicit Chunk(const GroupNormParams& p) {
        const int64_t start = blockIdx.x * p.chunk_pixels;
        first = blockIdx.y * p.pixels + start;
        pixels = min(p.chunk_pixels, p.pixels - start);
        vectors = p.channels / V;
        lanes = min(vectors, kThreads);
        rows = kThreads / lanes;
        lane = threadIdx.x % lanes;
        row = threadIdx.x / lanes;
        mine = row < rows && row < pixels ? (pixels - row - 1) / rows + 1 : 0;
    }
};

// Statistics of the V channels of one thread.
template <int V>
struct Channels {
    float pivot[V];
    float mean[V];
    float squares[V];
    float count;

    // Adds N pixels.
    template <int N>
    __device__ __forceinline__ void add(const Pack<bf16, V> (&x)[N]) {
        const float total = count + N;
        const float share = __fdividef(N, total);
        const float spread = count * share;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < N; ++j) sum += widen(x[j][i]);
            const float centre = sum * (1.0f / N);
            float about_centre = 0.0f;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float d = widen(x[j][i]) - centre;
                about_centre += d * d;
            }
            const float d = (centre - pivot[i]) - mean[i];
            mean[i] += d * share;
            squares[i] += about_centre + d * d * spread;
        }
        count = total;
    }
};

// What the threads of a block found: the moments of each channel of each row, and the pixels of
// each row. rows·channels ≤ 256·8; without vectors up to 1024 channels make one row.
struct SharedMoments {
    Moments entries[2048];
    float counts[kThreads];
};

template <int V>
__device__ __forceinline__ void sum_chunk(const GroupNormParams& p, SharedMoments& shared) {
    Moments* entries = shared.entries;
    float* counts = shared.counts;
    const Chunk<V> chunk(p);
    const int size = p.channels / p.groups;
    const bf16* frame = p.x + blockIdx.y * p.pixels * p.channels;

    for (int vector = chunk.lane; vector < chunk.vectors && chunk.row < chunk.rows;
         vector += chunk.lanes) {
        Channels<V> sums = {};
        const int channel = vector * V;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            sums.pivot[i] = widen(frame[(channel + i) / size * size]);
        }
        const bf16* x = p.x + (chunk.first + chunk.row) * p.channels + channel;
        const int64_t step = static_cast<int64_t>(chunk.rows) * p.channels;
        int64_t left = chunk.mine;
        for (; left >= kSumBatch; left -= kSumBatch) {
            Pack<bf16, V> batch[kSumBatch];
#pragma unroll
            for (int j = 0; j < kSumBatch; ++j) batch[j] = load<V>(x + j * step);
            sums.template add<kSumBatch>(batch);
            x += kSumBatch * step;
        }
        for (; left > 0; --left, x += step) {
            const Pack<bf16, V> single[1] = {load<V>(x)};
            sums.template add<1>(single);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
            entries[chunk.row * p.channels + channel + i] = {sums.mean[i], sums.squares[i]};
        }
        if (vector == 0) counts[chunk.row] = sums.count;
    }
    __syncthreads();

    // A warp per group: the mean of its entries, then their squares and the spread of their means.
    const float total = static_cast<float>(chunk.pixels) * size;
    for (int group = warp_index(); group < p.groups; group += kWarps) {
        const Moments* of_group = entries + group * size;
        float sum = 0.0f;
        for (int e = lane_index(); e < chunk.rows * size; e += kWarpSize) {
            const int row = e / size;
            sum += counts[row] * of_group[row * p.channels + e % size].mean;
        }
        const float mean = warp_sum(sum) / total;
        float squares = 0.0f;
        for (int e = lane_index(); e < chunk.rows * size; e += kWarpSize) {
            const int row = e / size;
            const Moments entry = of_group[row * p.channels + e % size];
            const float d = entry.mean - mean;
            squares += entry.squares + counts[row] * d * d;
        }
        squares = warp_sum(squares);
        if (lane_index() == 0) {
            const int64_t of_frame = static_cast<int64_t>(blockIdx.y) * p.groups + group;
            Moments* to = reinterpret_cast<Moments*>(p.workspace);
            to[of_frame * p.chunks + blockIdx.x] = {mean, squares};
        }
    }
}

// The result for a group: its mean and 1/√(variance + eps).
struct alignas(8) Normalizer {
    float mean, inverse;
};

// Those of a frame's groups, in the workspace after the moments of all chunks.
__device__ __forceinline__ Normalizer* normalizers(const GroupNormParams& p, int64_t frame) {
    const int64_t groups = static_cast<int64_t>(p.frames) * p.groups;
    return reinterpret_cast<Normalizer*>(p.workspace) + groups * p.chunks + frame * p.groups;
}

template <int V>
__device__ __forceinline__ void apply_chunk(const GroupNormParams& p) {
    const Chunk<V> chunk(p);
    if (chunk.mine == 0) return;
    const int size = p.channels / p.groups;
    const Normalizer* of_frame = normalizers(p, blockIdx.y);
    const int64_t step = static_cast<int64_t>(chunk.rows) * p.channels;

    for (int vector = chunk.lane; vector < chunk.vectors; vector += chunk.lanes) {
        const int channel = vector * V;
        const Pack<bf16, V> weight = load<V>(p.weight + channel), b = load<V>(p.bias + channel);
        float mean[V], scale[V], bias[V];
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const Normalizer group = of_frame[(channel + i) / size];
            mean[i] = group.mean;
            scale[i] = group.inverse * widen(weight[i]);
            bias[i] = widen(b[i]);
        }
        const auto map = [&](const Pack<bf16, V>& x) {
            Pack<bf16, V> y;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float normal = (widen(x[i]) - mean[i]) * scale[i] + bias[i];
                y[i] = narrow<bf16>(p.silu ? activate(normal, kSilu) : normal);
            }
            return y;
        };
        int64_t at = (chunk.first + chunk.row) * p.channels + channel;
        int64_t left = chunk.mine;
        for (; left >= kApplyBatch; left -= kApplyBatch) {
            Pack<bf16, V> batch[kApplyBatch];
#pragma unroll
            for (int j = 0; j < kApplyBatch; ++j) batch[j] = load<V>(p.x + at + j * step);
#pragma unroll
            for (int j = 0; j < kApplyBatch; ++j) store(p.out + at + j * step, map(batch[j]));
            at += kApplyBatch * step;
        }
        for (; left > 0; --left, at += step) store(p.out + at, map(load<V>(p.x + at)));
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_sums(const __grid_constant__ GroupNormParams p) {
    after_predecessor();
    __shared__ SharedMoments shared;
    if (p.channels % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0) {
        sum_chunk<8>(p, shared);
    } else {
        sum_chunk<1>(p, shared);
    }
}

// Merges the chunks of a frame, a warp per group.
extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_finish(const __grid_constant__ GroupNormParams p) {
    after_predecessor();
    const int64_t frame = blockIdx.x;
    const int size = p.channels / p.groups;
    const float total = static_cast<float>(p.pixels) * size;
    const auto count = [&](int chunk) {
        return static_cast<float>(min(p.chunk_pixels, p.pixels - chunk * p.chunk_pixels)) * size;
    };
    for (int group = warp_index(); group < p.groups; group += kWarps) {
        const Moments* of_group = reinterpret_cast<const Moments*>(p.workspace) +
                                  (frame * p.groups + group) * p.chunks;
        float sum = 0.0f;
        for (int c = lane_index(); c < p.chunks; c += kWarpSize) sum += count(c) * of_group[c].mean;
        const float mean = warp_sum(sum) / total;
        float squares = 0.0f;
        for (int c = lane_index(); c < p.chunks; c += kWarpSize) {
            const Moments chunk = of_group[c];
            const float d = chunk.mean - mean;
            squares += chunk.squares + count(c) * d * d;
        }
        const float variance = warp_sum(squares) / total;
        if (lane_index() == 0) {
            const float pivot = widen(p.x[frame * p.pixels * p.channels + group * size]);
            normalizers(p, frame)[group] = {pivot + mean, rsqrtf(variance + p.eps)};
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_apply_v8(const __grid_constant__ GroupNormParams p) {
    after_predecessor();
    apply_chunk<8>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    group_norm_apply_v1(const __grid_constant__ GroupNormParams p) {
    after_predecessor();
    apply_chunk<1>(p);
}
