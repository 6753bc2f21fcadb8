// Linear layers on the tensor cores of sm_80 and newer: y = x·wᵀ + bias, with what follows.
//
//   x [m, k], w [n, k] (as checkpoints store it), bias [n] or null, out [m, n];
//   epilogue 0   out  = act(x·wᵀ + bias)
//            1   out += x·wᵀ + bias
//            2   out += gate·(x·wᵀ + bias), gate[sample of the row][column] in f32
//
// bf16 in, f32 sums and epilogue, one rounding to the output's type (bf16, or f32 if asked).
// The order of summation depends neither on the launch nor on the tile: equal inputs give
// equal bits.
//
// Limits: k and the strides of x and w multiples of 8, x and w aligned to 16 bytes; m, n ≥ 1.
// Any n and any alignment of `out` and `gate` are correct; stores are 16 bytes wide where `out`
// is aligned to 16 bytes and its stride is a multiple of 8 (for a gate: aligned to 16 bytes,
// stride a multiple of 4). `out` overlaps neither x nor w.
//
// Launch: grid ⌈m/M⌉·⌈n/N⌉ (one-dimensional), for gemm_MxN:
//
//   entry          threads   dynamic shared memory   meant for
//   gemm_256x128   256       73728                   large m and n, most reuse per byte of L2
//   gemm_128x128   128       49152                   large m and n
//   gemm_128x64    128       49152                   too few tiles of 128×128 to fill the device
//   gemm_64x64     128       49152                   small m
//   gemm_16x64     128       40960                   m ≤ 16: bound by reading w
//   gemm_128x32    128       40960                   n ≤ 32
//   gemm_128x16    128       36864                   n ≤ 16
//
// The main loop and the reasons for these tiles: lib/gemm_tile.cuh.

#include "lib/epilogue.cuh"
#include "lib/gemm_tile.cuh"
#include "lib/launch.cuh"

struct GemmParams {
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    void* out;
    const float* gate;
    int64_t ldx;
    int64_t ldw;
    int64_t ldo;
    int64_t ld_gate;
    int m;
    int n;
    int k;
    int epilogue;
    int activation;
    int out_f32;
    RowGroups groups;
    int pad;
};
static_assert(sizeof(GemmParams) == 168, "as on the host");

template <typename Tile>
__device__ __forceinline__ void gemm(const GemmParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const TilePlace place = place_of_block<Tile>(p.m, p.n);
    MatrixRows<Tile, Tile::kM> rows(p.x, p.ldx, place.row, p.m, p.k);
    MatrixRows<Tile, Tile::kN> weights(p.weight, p.ldw, place.column, p.n, p.k);
    Sums<Tile> sums;
    const int slices = (p.k + Tile::kDepth - 1) / Tile::kDepth;
    multiply_tile(rows, weights, slices, shared_address(shared), sums);
    store_tile<Tile>(LinearEpilogue<GemmParams>(p), place, reinterpret_cast<float*>(shared), sums);
}

extern "C" {

__global__ void __launch_bounds__(256, 1) gemm_256x128(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile256x128>(p);
}

__global__ void __launch_bounds__(128, 2) gemm_128x128(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile128x128>(p);
}

__global__ void __launch_bounds__(128, 2) gemm_128x64(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile128x64>(p);
}

__global__ void __launch_bounds__(128, 2) gemm_64x64(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile64x64>(p);
}

__global__ void __launch_bounds__(128, 2) gemm_16x64(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile16x64>(p);
}

__global__ void __launch_bounds__(128, 2) gemm_128x32(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile128x32>(p);
}

__global__ void __launch_bounds__(128, 2) gemm_128x16(const __grid_constant__ GemmParams p) {
    after_predecessor();
    gemm<Tile128x16>(p);
}

}  // extern "C"
