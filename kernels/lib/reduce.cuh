// Sums over the lanes of a warp, always in the same order.
#pragma once

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over each run of `kLanes` neighbouring lanes (a power of two), in every one of them.
// All lanes of the warp must take part.
template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(kAllLanes, x, distance);
    }
    return x;
}
