// Element types, wide loads and stores, and the scalar functions that several kernels share.
//
// Storage is bf16 (or f32 where a kernel says so); all arithmetic is f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

// N elements that travel together: one 16-byte access for 8 bf16 values.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T values[N];
    __device__ __forceinline__ T& operator[](int i) { return values[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }

// To nearest, ties to even; NaN stays NaN.
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }

// Two values in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// The non-linearities of a model; values are those of the enum on the host.
enum Activation : int {
    kNone = 0,
    kSilu = 1,       // x·σ(x)
    kGeluTanh = 2,   // x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
    kGeluErf = 3,    // x/2·(1 + erf(x/√2))
    kQuickGelu = 4,  // x·σ(1.702·x)
};

// The fast division is good to 2 units in the last place of f32, and 0 where e⁻ˣ overflows.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ __forceinline__ float gelu_tanh(float x) {
    // 1/2·(1 + tanh(u)) = σ(2u).
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x * sigmoid(2.0f * u);
}

// The same of two values with three special functions instead of four: 1/a and 1/b are b/(ab) and
// a/(ab). The powers stop at 2⁶⁰, which keeps ab finite; gelu is then below 10⁻¹⁷.
__device__ __forceinline__ void gelu_tanh_pair(float& x, float& y) {
    // −2·log₂e·√(2/π)·(x + 0.044715·x³)
    const auto power = [](float v) {
        float p;
        const float e = fminf(v * (-2.3022082f - 0.10294324f * (v * v)), 60.0f);
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(e));
        return 1.0f + p;
    };
    const float a = power(x), b = power(y);
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a * b));
    x *= b * inverse;
    y *= a * inverse;
}

__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
        case kSilu: return x * sigmoid(x);
        case kGeluTanh: return gelu_tanh(x);
        case kGeluErf: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
        case kQuickGelu: return x * sigmoid(1.702f * x);
        default: return x;
    }
}

// Which sample of the batch the rows belong to: `count` runs of consecutive rows, run i
// ending before row `end[i]`.
struct RowGroups {
    static constexpr int kMost = 8;
    int count;
    int end[kMost];
    int sample[kMost];

    __device__ __forceinline__ int sample_of(int row) const {
        int found = sample[0];
#pragma unroll
        for (int i = 1; i < kMost; ++i) {
            if (i < count && row >= end[i - 1]) found = sample[i];
        }
        return found;
    }
};
static_assert(sizeof(RowGroups) == 68, "as on the host");
