// The sampler's noise: standard normals from the counter-based generator Philox 4x32-10 (Salmon,
// Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) by the Box-Muller
// transform, and from these the noise of 2×2 blocks that sums to zero in each.
//
//   normal_noise   out[t, y, x, 4q .. 4q + 4] = normals([x, y, first_frame + t, kind | q]);
//                  with block ≠ 0 each 2×2 block e of a channel becomes √(4/3)·(e − mean(e))
//
// Shapes     out [frames, height, width, 16] in f32; height and width are even where block ≠ 0.
//            words [4] in u32: the key's lower and upper word, kind, first_frame. Both aligned to
//            16 bytes.
// Precision  the bits of the host: f64 up to the one rounding that ends a value. Every operation is
//            an IEEE addition, product, quotient or root, in the host's order and never contracted
//            into a fused multiply-add, since bits that depend on the machine would make a seed
//            mean different videos.
// Launch     block 256, grid ceil(n / 256) with n = frames·height·width·4, a quarter of that where
//            block ≠ 0. No shared memory.
//
// A thread makes the four normals of one counter, or those of the four pixels of a block.
#include "lib/launch.cuh"
#include "lib/types.cuh"

struct NoiseParams {
    float* out;
    const uint32_t* words;
    int frames, height, width;
    int block;
};
static_assert(sizeof(NoiseParams) == 32, "as on the host");

constexpr int kThreads = 256;
constexpr int kChannels = 16;
constexpr int kQuads = kChannels / 4;

// An f64 whose products are never contracted with the additions around them.
struct Strict {
    double value;
    __device__ __forceinline__ Strict(double value) : value(value) {}
};
__device__ __forceinline__ Strict operator+(Strict a, Strict b) {
    return __dadd_rn(a.value, b.value);
}
__device__ __forceinline__ Strict operator-(Strict a, Strict b) {
    return __dsub_rn(a.value, b.value);
}
__device__ __forceinline__ Strict operator*(Strict a, Strict b) {
    return __dmul_rn(a.value, b.value);
}
__device__ __forceinline__ Strict operator/(Strict a, Strict b) {
    return __ddiv_rn(a.value, b.value);
}

__device__ __forceinline__ uint32_t high_word(Strict x) {
    return static_cast<uint32_t>(__double2hiint(x.value));
}
__device__ __forceinline__ int exponent_bits(Strict x) { return high_word(x) >> 20 & 0x7ff; }

// Logarithm, sine and cosine are those of FreeBSD's msun (e_log.c, k_sin.c, k_cos.c, e_rem_pio2.c;
// copyright 1993 Sun Microsystems), which the host has from the `libm` crate, restated for the
// arguments that occur here: the same polynomials in the same order of operations.

// For 0 < x < 1, normal. x = 2^k·(1 + f) with 1 + f in √½ .. √2, and
// ln(1 + f) = f − f²/2 + s·(f²/2 + R(s²)) with s = f/(2 + f).
__device__ __forceinline__ Strict natural_logarithm(Strict x) {
    const uint32_t shifted = high_word(x) + (0x3ff00000 - 0x3fe6a09e);
    const Strict k = static_cast<int>(shifted >> 20) - 0x3ff;
    const uint32_t high = (shifted & 0x000fffff) + 0x3fe6a09e;
    const uint32_t low = static_cast<uint32_t>(__double_as_longlong(x.value));
    const Strict f = Strict(__hiloint2double(high, low)) - 1.0;
    const Strict half_square = Strict(0.5) * f * f;
    const Strict s = f / (Strict(2.0) + f);
    const Strict z = s * s;
    const Strict w = z * z;
    const Strict even = w * (Strict(3.999999999940941908e-01) +
                             w * (Strict(2.222219843214978396e-01) +
                                  w * Strict(1.531383769920937332e-01)));
    const Strict odd = z * (Strict(6.666666666666735130e-01) +
                            w * (Strict(2.857142874366239149e-01) +
                                 w * (Strict(1.818357216161805012e-01) +
                                      w * Strict(1.479819860511658591e-01))));
    const Strict r = odd + even;
    return s * (half_square + r) + k * Strict(1.90821492927058770002e-10) - half_square + f +
           k * Strict(6.93147180369123816490e-01);
}

// The sine of x + y for |x| ≤ π/4, y far below x; `reduced` tells whether there is a y.
__device__ __forceinline__ Strict sine_kernel(Strict x, Strict y, bool reduced) {
    constexpr double kFirst = -1.66666666666666324348e-01;
    const Strict z = x * x;
    const Strict w = z * z;
    const Strict r =
        Strict(8.33333333332248946124e-03) +
        z * (Strict(-1.98412698298579493134e-04) + z * Strict(2.75573137070700676789e-06)) +
        z * w * (Strict(-2.50507602534068634195e-08) + z * Strict(1.58969099521155010221e-10));
    const Strict v = z * x;
    if (!reduced) return x + v * (Strict(kFirst) + z * r);
    return x - ((z * (Strict(0.5) * y - v * r) - y) - v * Strict(kFirst));
}

// The cosine of x + y.
__device__ __forceinline__ Strict cosine_kernel(Strict x, Strict y) {
    const Strict z = x * x;
    const Strict w = z * z;
    const Strict r =
        z * (Strict(4.16666666666666019037e-02) +
             z * (Strict(-1.38888888888741095749e-03) + z * Strict(2.48015872894767294178e-05))) +
        w * w *
            (Strict(-2.75573143513906633035e-07) +
             z * (Strict(2.08757232129817482790e-09) + z * Strict(-1.13596475577881948265e-11)));
    const Strict half = Strict(0.5) * z;
    const Strict near_one = Strict(1.0) - half;
    return near_one + (((Strict(1.0) - near_one) - half) + (z * r - x * y));
}

// For 0 ≤ x < 2π.
__device__ __forceinline__ void sine_and_cosine(Strict x, Strict& sine, Strict& cosine) {
    const uint32_t high = high_word(x);
    if (high <= 0x3fe921fb) {  // x ≤ π/4
        const bool tiny = high < 0x3e46a09e;
        sine = tiny ? x : sine_kernel(x, 0.0, false);
        cosine = tiny ? Strict(1.0) : cosine_kernel(x, 0.0);
        return;
    }
    // x = n·π/2 + y0 + y1, by subtracting n times the first 33 bits of π/2 and the rest.
    const int n = high <= 0x4002d97c ? 1 : high <= 0x400f6a7a ? 2 : high <= 0x4015fdbc ? 3 : 4;
    const Strict multiple = n;
    Strict r = x - multiple * Strict(1.57079632673412561417e+00);
    Strict w = multiple * Strict(6.07710050650619224932e-11);
    Strict y0 = r - w;
    const bool near_multiple = high == 0x3ff921fb || high == 0x400921fb || high == 0x4012d97c ||
                               high == 0x401921fb;
    const int exponent = high >> 20;
    if (near_multiple && exponent - exponent_bits(y0) > 16) {
        // The leading bits cancelled: 33 bits more, and if need be another 33.
        Strict t = r;
        w = multiple * Strict(6.07710050630396597660e-11);
        r = t - w;
        w = multiple * Strict(2.02226624879595063154e-21) - ((t - r) - w);
        y0 = r - w;
        if (exponent - exponent_bits(y0) > 49) {
            t = r;
            w = multiple * Strict(2.02226624871116645580e-21);
            r = t - w;
            w = multiple * Strict(8.47842766036889956997e-32) - ((t - r) - w);
            y0 = r - w;
        }
    }
    const Strict y1 = (r - y0) - w;
    const Strict s = sine_kernel(y0, y1, true), c = cosine_kernel(y0, y1);
    sine = n == 1 ? c : n == 2 ? Strict(-s.value) : n == 3 ? Strict(-c.value) : s;
    cosine = n == 1 ? Strict(-s.value) : n == 2 ? Strict(-c.value) : n == 3 ? s : c;
}

struct Words {
    uint32_t values[4];
};

__device__ __forceinline__ Words philox4x32(Words c, uint32_t key_low, uint32_t key_high) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
    constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    constexpr int kRounds = 10;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t high0 = __umulhi(kMultiplier0, c.values[0]);
        const uint32_t low0 = kMultiplier0 * c.values[0];
        const uint32_t high1 = __umulhi(kMultiplier1, c.values[2]);
        const uint32_t low1 = kMultiplier1 * c.values[2];
        c = {{high1 ^ c.values[1] ^ key_low, low1, high0 ^ c.values[3] ^ key_high, low0}};
        key_low += kWeyl0;
        key_high += kWeyl1;
    }
    return c;
}

// Two standard normals from two uniform words; half a unit up, the logarithm never sees 0.
__device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
    constexpr double kTau = 6.28318530717958647692528676655900577;
    constexpr double kUnit = 1.0 / 4294967296.0;
    const Strict logarithm = natural_logarithm((Strict(a) + 0.5) * kUnit);
    const Strict radius = __dsqrt_rn((Strict(-2.0) * logarithm).value);
    Strict sine = 0.0, cosine = 0.0;
    sine_and_cosine(Strict(kTau) * (Strict(b) * kUnit), sine, cosine);
    first = __double2float_rn((radius * cosine).value);
    second = __double2float_rn((radius * sine).value);
}

// `words` are those of the parameters.
__device__ __forceinline__ Pack<float, 4> normals_at(const Pack<uint32_t, 4>& words, int64_t x,
                                                     int64_t y, int64_t frame, int quad) {
    const Words counter = {{static_cast<uint32_t>(x), static_cast<uint32_t>(y),
                            words[3] + static_cast<uint32_t>(frame), words[2] | quad}};
    const Words random = philox4x32(counter, words[0], words[1]);
    Pack<float, 4> normals;
    box_muller(random.values[0], random.values[1], normals[0], normals[1]);
    box_muller(random.values[2], random.values[3], normals[2], normals[3]);
    return normals;
}

// e − mean(e) over a block, made as variable as four independent normals are together.
__device__ __forceinline__ void project_block(float (&block)[4]) {
    constexpr double kFactor = 0x1.279a74590331cp+0;  // √(1 + γ), γ = 1/3
    const Strict sum = Strict(block[0]) + block[1] + block[2] + block[3];
    const Strict mean = sum * 0.25;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        block[i] = __double2float_rn((Strict(kFactor) * (Strict(block[i]) - mean)).value);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    normal_noise(const __grid_constant__ NoiseParams p) {
    after_predecessor();
    const int side = p.block ? 2 : 1;  // of the square that a thread fills
    const int rows = p.height / side, columns = p.width / side;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int quad = index % kQuads;
    const int64_t square = index / kQuads;
    const int64_t row = square / columns;
    const int64_t frame = row / rows;
    if (frame >= p.frames) return;
    const int64_t y = row % rows * side, x = square % columns * side;
    float* to = p.out + ((frame * p.height + y) * p.width + x) * kChannels + quad * 4;
    const Pack<uint32_t, 4> words = load<4>(p.words);
    if (!p.block) {
        store(to, normals_at(words, x, y, frame, quad));
        return;
    }
    Pack<float, 4> pixels[4];
#pragma unroll 1  // the four are the same long code
    for (int i = 0; i < 4; ++i) {
        const Pack<float, 4> made = normals_at(words, x + i % 2, y + i / 2, frame, quad);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (i == j) pixels[j] = made;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float block[4] = {pixels[0][c], pixels[1][c], pixels[2][c], pixels[3][c]};
        project_block(block);
#pragma unroll
        for (int i = 0; i < 4; ++i) pixels[i][c] = block[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        store(to + (static_cast<int64_t>(i / 2) * p.width + i % 2) * kChannels, pixels[i]);
    }
}
