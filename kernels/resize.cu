// Changes of a latent's size between the stages of the pyramid:
//   bilinear_half            out = ((a + b) + (c + d))/4 · factor over each 2×2 block, which is
//                            bilinear resizing by one half (align_corners = false)
//   nearest_double_renoise   out = alpha · x + beta · noise, x repeated in 2×2 blocks
//
// Shapes     x [frames, height, width, channels] contiguous f32; out (and noise) the same with half
//            (height and width are then even) or twice the height and width. noise may be out.
// Precision  f32, the bits of the host: its order of operations, nothing contracted.
// Alignment  16 bytes, channels a multiple of 4.
// Launch     block 256, grid ceil(n / 256) with n the elements of out over 4. No shared memory.
//
// Latents are a few megabytes at most: one thread for four channels of an output pixel.
#include "lib/launch.cuh"
#include "lib/types.cuh"

struct HalveParams {
    const float* x;
    float* out;
    int frames, height, width, channels;
    float factor;
    int pad;
};
static_assert(sizeof(HalveParams) == 40, "as on the host");

struct RenoiseParams {
    const float* x;
    const float* noise;
    float* out;
    int frames, height, width, channels;
    float alpha, beta;
};
static_assert(sizeof(RenoiseParams) == 48, "as on the host");

constexpr int kThreads = 256;
constexpr int V = 4;

// Where a thread's vector lies in out; `row` counts through the frames.
struct Place {
    int64_t row;
    int64_t column;
    int channel;
};

__device__ __forceinline__ Place place_of_thread(int width, int channels) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int vectors = channels / V;
    const int64_t pixel = index / vectors;
    return {pixel / width, pixel % width, static_cast<int>(index % vectors) * V};
}

extern "C" __global__ void __launch_bounds__(kThreads)
    bilinear_half(const __grid_constant__ HalveParams p) {
    after_predecessor();
    const int width = p.width / 2;
    const Place at = place_of_thread(width, p.channels);
    // Heights are even, so a pair of rows never straddles two frames.
    if (at.row >= static_cast<int64_t>(p.frames) * (p.height / 2)) return;
    const float* top = p.x + (2 * at.row * p.width + 2 * at.column) * p.channels + at.channel;
    const float* bottom = top + static_cast<int64_t>(p.width) * p.channels;
    const Pack<float, V> a = load<V>(top), b = load<V>(top + p.channels);
    const Pack<float, V> c = load<V>(bottom), d = load<V>(bottom + p.channels);
    Pack<float, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const float sum = __fadd_rn(__fadd_rn(a[i], b[i]), __fadd_rn(c[i], d[i]));
        y[i] = __fmul_rn(__fmul_rn(sum, 0.25f), p.factor);
    }
    store(p.out + (at.row * width + at.column) * p.channels + at.channel, y);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    nearest_double_renoise(const __grid_constant__ RenoiseParams p) {
    after_predecessor();
    const int width = p.width * 2;
    const Place at = place_of_thread(width, p.channels);
    if (at.row >= static_cast<int64_t>(p.frames) * (p.height * 2)) return;
    const int64_t source = at.row / 2 * p.width + at.column / 2;
    const int64_t to = (at.row * width + at.column) * p.channels + at.channel;
    const Pack<float, V> x = load<V>(p.x + source * p.channels + at.channel);
    const Pack<float, V> noise = load<V>(p.noise + to);
    Pack<float, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) {
        y[i] = __fadd_rn(__fmul_rn(p.alpha, x[i]), __fmul_rn(p.beta, noise[i]));
    }
    store(p.out + to, y);
}
