// Linear layers on Hopper: out = x[m, k] · weight[n, k]ᵀ + bias, with an epilogue.
//
//   epilogue 0  out[r, c]  = activation(x·Wᵀ + bias)
//   epilogue 1  out[r, c] += x·Wᵀ + bias
//   epilogue 2  out[r, c] += gate[sample_of(r) · ld_gate + c] · (x·Wᵀ + bias)
//
// Layout: row-major, rows ldx, ldw, ldo elements apart. Precision: bf16 in, f32 products and sums
// (k in steps of 16 in one fixed order), f32 epilogue, one rounding to bf16 (none in the _f32 kernels).
//
// Limits: n % 8 == 0 and k % 8 == 0; any m ≥ 1, tails included. x, weight, out and bias 16-byte
// aligned, ldx, ldw and ldo multiples of 8 elements; gate 16-byte aligned, ld_gate % 4 == 0. The
// output may not overlap x.
//
// Tensor maps (bf16, 128-byte swizzle, no interleave, zero fill outside, element strides 1):
//   a: (k, m), stride ldx·2 bytes, box 64 × rows;   b: (k, n), stride ldw·2 bytes, box 64 × columns
// with, per entry point,
//                            tile      box rows of a, b   stages   dynamic shared memory
//   gemm_sm90_128x256        128×256   128, 256           4        229440
//   gemm_sm90_128x256_pair   128×256   128, 128           4        229440    cluster of 2
//   gemm_sm90_128x192_pair   128×192   128,  96           4        196672    cluster of 2
//   gemm_sm90_256x128_pair   256×128   256,  64           4        229440    cluster of 2
//   gemm_sm90_128x128        128×128   128, 128           6        229472
//   gemm_sm90_128x64         128×64    128,  64           8        229504
//   gemm_sm90_128x128_f32 and gemm_sm90_128x64_f32: the same with f32 output
//
// Launch: 384 threads; grid.x = min(multiprocessors, tiles) blocks, for a pair the largest multiple
// of 2 not above min(multiprocessors, 2 · pairs), where tiles = ⌈m / rows⌉ · ⌈n / columns⌉ and
// pairs = ⌈m / (2 · rows)⌉ · ⌈n / columns⌉. The cluster size is compiled in.
//
// Why so: see lib/gemm_sm90.cuh. 128 × 256 reads least per product; a pair halves what its columns
// cost; 192 columns fit widths such as 1920 without waste; the small tiles fill the device when
// there are few rows or columns.

#include "lib/epilogue.cuh"
#include "lib/gemm_sm90.cuh"

struct GemmSm90Params {
    TensorMap a, b;
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    void* out;
    const float* gate;
    int64_t ldx, ldw, ldo, ld_gate;
    int m, n, k;
    int epilogue;
    int activation;
    int out_f32;
    RowGroups groups;
    int pad;
};
static_assert(sizeof(GemmSm90Params) == 448, "as on the host");

template <class Tile, typename Out>
struct Gemm {
    const GemmSm90Params& p;

    struct Place {
        int row, column;
    };

    __device__ __forceinline__ int row_tiles() const {
        constexpr int kRows = Tile::kRows * Tile::kCluster;
        return (p.m + kRows - 1) / kRows;
    }
    __device__ __forceinline__ int column_tiles() const { return (p.n + Tile::kCols - 1) / Tile::kCols; }
    __device__ __forceinline__ int tiles() const { return row_tiles() * column_tiles(); }

    __device__ __forceinline__ Place place(int tile, int rank) const {
        const TilePosition at(tile, row_tiles(), column_tiles());
        return {(at.row * Tile::kCluster + rank) * Tile::kRows, at.column * Tile::kCols};
    }
    __device__ __forceinline__ int column(const Place& place) const { return place.column; }
    __device__ __forceinline__ int steps(const Place&) const {
        return (p.k + Tile::kDepth - 1) / Tile::kDepth;
    }
    __device__ __forceinline__ const TensorMap* columns_map() const { return &p.b; }

    template <class Step>
    __device__ __forceinline__ void each_step(const Place& place, const Step& step) const {
        for (int k = 0; k < p.k; k += Tile::kDepth) {
            step([&](uint32_t to, uint32_t barrier) { copy_box_2d(to, &p.a, barrier, k, place.row); }, k);
        }
    }

    // Lane l finishes columns 8·(l % 8).. of rows l / 8 + 4·i.
    template <class Stage>
    __device__ __forceinline__ void finish(const Place& place, int tile_row, int tile_column,
                                           const Stage& stage, const float* staging) const {
        if (place.column + tile_column >= p.n) return;
        const int lane = threadIdx.x % 32;
        const int first_row = place.row + tile_row + lane / 8;
        const int column = place.column + tile_column + lane % 8 * 8;
        const bool inside = column < p.n;
        const bool adds = p.epilogue != kStore;
        Out* const out = static_cast<Out*>(p.out) + first_row * p.ldo + column;

        Octet<bf16> bias;
        if (p.bias != nullptr && inside) bias.read(p.bias + column);
        // Read before the staging, which hides the latency.
        Octet<Out> old[4];
        if (adds) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (inside && first_row + 4 * i < p.m) old[i].read(out + 4 * i * p.ldo);
            }
        }
        stage();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first_row + 4 * i;
            if (!inside || row >= p.m) continue;
            float v[8];
            staged_group(v, staging, lane / 8 + 4 * i, lane % 8);
            bias.add_to(v);
            if (adds) {
                if (p.epilogue == kGatedAccumulate) {
                    Octet<float> gate;
                    gate.read(p.gate + p.groups.sample_of(row) * p.ld_gate + column);
                    gate.multiply(v);
                }
                old[i].add_to(v);
            } else {
                activate_all(v, p.activation);
            }
            Octet<Out> result;
            result.round(v);
            result.write(out + 4 * i * p.ldo);
        }
    }
};

template <class Tile, typename Out>
__device__ __forceinline__ void gemm(const GemmSm90Params& p) {
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&p.a);
        prefetch_tensor_map(&p.b);
    }
    multiply_tiles<Tile>(Gemm<Tile, Out>{p});
}

// Entry points; __launch_bounds__(…, 1) is what lets the warpgroups share out the registers anew.
#define GEMM_KERNEL(name, Out, rows, columns)                                \
    extern "C" __global__ void __launch_bounds__(384, 1)                     \
        name(const __grid_constant__ GemmSm90Params p) {                     \
        gemm<Tile<rows, columns, 1>, Out>(p);                                \
    }
#define GEMM_PAIR_KERNEL(name, Out, rows, columns)                           \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) \
        name(const __grid_constant__ GemmSm90Params p) {                     \
        gemm<Tile<rows, columns, 2>, Out>(p);                                \
    }

GEMM_KERNEL(gemm_sm90_128x256, bf16, 128, 256)
GEMM_PAIR_KERNEL(gemm_sm90_128x256_pair, bf16, 128, 256)
GEMM_PAIR_KERNEL(gemm_sm90_128x192_pair, bf16, 128, 192)
GEMM_PAIR_KERNEL(gemm_sm90_256x128_pair, bf16, 256, 128)
GEMM_KERNEL(gemm_sm90_128x128, bf16, 128, 128)
GEMM_KERNEL(gemm_sm90_128x64, bf16, 128, 64)
GEMM_KERNEL(gemm_sm90_128x128_f32, float, 128, 128)
GEMM_KERNEL(gemm_sm90_128x64_f32, float, 128, 64)
