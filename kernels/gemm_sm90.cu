// Linear layers on Hopper: out = x[m, k] · weight[n, k]ᵀ + bias, with an epilogue.
//
//   epilogue 0  out[r, c]  = activation(x·Wᵀ + bias)
//   epilogue 1  out[r, c] += x·Wᵀ + bias
//   epilogue 2  out[r, c] += gate[sample_of(r) · ld_gate + c] · (x·Wᵀ + bias)
//
// The _heads kernels: with epilogue 0 and heads.table not null, columns come in parts of heads.part_columns, a multiple
// of 64, and of each part whose weight is not null each 64 columns are a head, of which
//   h = (x·Wᵀ + bias) · rsqrt(mean((x·Wᵀ + bias)²) + heads.eps) · heads.weight[part]
//   out[r, 2i], out[r, 2i + 1] = h[2i]·cos − h[2i + 1]·sin, h[2i]·sin + h[2i + 1]·cos
// where table[r · ld_table + 2i] and [… + 1] are cos and sin (f32, 8-byte aligned, ld_table even).
//
// Layout: row-major, rows ldx, ldw, ldo elements apart. Precision: bf16 in, f32 products and sums
// (k in steps of 16 in one fixed order), f32 epilogue, one rounding to bf16 (none in the _f32 kernels).
//
// Two products may come in one launch (a Group, whose units are tiles, or pairs of tiles in a cluster).
//
// Limits: n % 8 == 0 and k % 8 == 0; any m ≥ 1, tails included. x, weight, out and bias 16-byte
// aligned, ldx, ldw and ldo multiples of 8 elements; gate 16-byte aligned, ld_gate % 4 == 0. The
// output may not overlap x.
//
// Tensor maps (bf16, 128-byte swizzle, no interleave, zero fill outside, element strides 1):
//   a: (k, m), stride ldx·2 bytes, box 64 × rows;   b: (k, n), stride ldw·2 bytes, box 64 × columns
//   c: (n, m), stride ldo·2 bytes, box 64 × 16, of the output; any bytes will do for the _f32 kernels
// with, per entry point,
//                            tile      box rows of a, b   stages   dynamic shared memory
//   gemm_sm90_128x128_pair   128×128   128,  64           6        229536    cluster of 2, in turn
//   gemm_sm90_128x192        128×192   128, 192           4        213120
//   gemm_sm90_64x192_pair     64×192    64,  96           6        213152    cluster of 2, in turn
//   gemm_sm90_64x64           64×64     64,  64          13        229648    in turn
//   gemm_sm90_128x64         128×64    128,  64           8        213184
//   gemm_sm90_128x64_split2  128×64    128,  64           8        229568    cluster of 2, k in 2 parts
//   gemm_sm90_128x64_split4  128×64    128,  64           7        213168    cluster of 4, k in 4 parts
//   gemm_sm90_128x128_f32    128×128   128, 128           6        229472
//   gemm_sm90_128x64_f32     128×64    128,  64           8        229504
//
// The tiles of a product have tile_rows rows, and so has the box of a: a multiple of 16 up to the rows in this
// table, with which there are no more tiles. Boxes that reach beyond the last row are slow to copy.
//
// Launch: 384 threads; grid.x = min(multiprocessors, tiles) blocks, for a pair the largest multiple
// of 2 not above min(multiprocessors, 2 · pairs), where a product has ⌈m / rows⌉ · ⌈n / columns⌉ tiles
// or ⌈m / (2 · rows)⌉ · ⌈n / columns⌉ pairs. For k in parts the grid is exactly as many blocks for each tile,
// and every product has at least as many steps of 64 values of k. The cluster size is compiled in. Of every
// kernel but the _f32 ones there is another, …_heads, alike in all this.
//
// Why so: see lib/gemm_sm90.cuh. With k of 1536 the end of a tile is a fifth of its time where both
// consumers share it; taking tiles in turn hides that where each block has several. 128 × 192 divides
// the widths of the models without waste; the small tile fills the device when there are few rows, and
// k in parts does where even those are too few.

#include <type_traits>

#include "lib/epilogue.cuh"
#include "lib/gemm_sm90.cuh"
#include "lib/group.cuh"

struct Heads {
    const bf16* weight[3];
    const float* table;
    int64_t ld_table;
    int part_columns;
    float eps;

    // Of the head that begins at `column`; null if it is stored as it is.
    __device__ __forceinline__ const bf16* weight_of(int column) const {
        if (table == nullptr) return nullptr;
        return weight[column < part_columns ? 0 : column < 2 * part_columns ? 1 : 2];
    }
};

struct GemmSm90Params {
    TensorMap a, b, c;
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
    Heads heads;
    int tile_rows;
};
static_assert(sizeof(GemmSm90Params) == 640, "as on the host");
using GemmGroup = Group<GemmSm90Params, 2>;
static_assert(sizeof(GemmGroup) == 1344, "as on the host");

// The product that a tile is of, its first row and column, and which part of the inner dimension it is.
struct GemmPlace {
    int product;
    int row, column;
    int part;
};

// Finishes the tiles of one warp in the layout of the accumulators, in boxes of 16 rows × 64 columns
// of bf16 in shared memory: bulk copies bring what is added to while the products run, the result
// takes its place and bulk copies store it while the next tile begins. Row r of a box holds chunk c
// (8 columns) at c ^ (r % 8), so that the 4 bytes of each lane meet no bank twice.
template <class Tile, bool kHeads>
class BoxFinish {
public:
    template <class Problem>
    __device__ __forceinline__ BoxFinish(const Problem& problem, uint8_t* shared, int warp)
        : group(problem.group),
          staging(shared + Tile::kStaging + warp * Tile::kBuffers * Tile::kBufferBytes),
          barrier(shared_address(shared) + Tile::kWarpBarriers + 8 * warp) {}

    __device__ __forceinline__ void ahead(const GemmPlace& place, int first) {
        const GemmSm90Params& p = group.problem[place.product];
        read_columns(place, first, 0);
        if constexpr (kHeads) {
            if (rotates(place)) read_rotations(p, row(place, first, 0));
        }
        if (threadIdx.x % 32 == 0) {
            box_stores_read<0>();
            if (p.epilogue != kStore) {
                barrier_expect(barrier, Tile::kBuffers * Tile::kBufferBytes);
#pragma unroll
                for (int piece = 0; piece < Tile::kBuffers; ++piece) {
                    copy_box_2d(shared_address(buffer(piece)), &p.c, barrier, column(place, piece),
                                row(place, first, piece));
                }
            }
        }
        __syncwarp();
    }

    template <int kFragments, int kCount>
    __device__ __forceinline__ void finish(const GemmPlace& place, int first, const float (&d)[kFragments][kCount]) {
        const GemmSm90Params& p = group.problem[place.product];
        // Not unrolled: only the choice of registers depends on their names.
#pragma unroll 1
        for (int piece = 0; piece < kPieces; ++piece) {
            if (Tile::kFragments > 1 && first + piece / kChunks * 64 >= p.tile_rows) break;
            if (piece >= Tile::kBuffers) reuse(place, first, piece);
            float v[32];
            pick<0>(v, d, piece);
            add_bias(v);
            if (p.epilogue == kGatedAccumulate) multiply_gate(v, place, first, piece);
            if constexpr (kHeads) {
                const bf16* const weight = p.heads.weight_of(column(place, piece));
                if (weight != nullptr) norm_and_rotate(v, weight, p.heads.eps);
            }
            if (piece + 1 < kPieces) {
                read_columns(place, first, piece + 1);
                if constexpr (kHeads) {
                    const bool rows_end = (piece + 1) % kChunks == 0;
                    if (rows_end && rotates(place)) read_rotations(p, row(place, first, piece + 1));
                }
            }
            if (p.epilogue == kStore) {
                activate_all(v, p.activation);
            } else if (piece == 0 || piece >= Tile::kBuffers) {
                barrier_wait(barrier, parity);
                parity ^= 1;
            }
            put(v, piece, p.epilogue != kStore);
            fence_async_proxy();
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                store_box_2d(&p.c, column(place, piece), row(place, first, piece), shared_address(buffer(piece)));
                commit_box_stores();
            }
        }
    }

    __device__ __forceinline__ void drain() { box_stores_read<0>(); }

private:
    // Boxes of a fragment and of the tile.
    static constexpr int kChunks = Tile::kCols / 64;
    static constexpr int kPieces = Tile::kFragments * kChunks;

    __device__ __forceinline__ uint8_t* buffer(int piece) const {
        return staging + piece % Tile::kBuffers * Tile::kBufferBytes;
    }
    __device__ __forceinline__ static int row(const GemmPlace& place, int first, int piece) {
        return place.row + first + piece / kChunks * 64;
    }
    __device__ __forceinline__ static int column(const GemmPlace& place, int piece) {
        return place.column + piece % kChunks * 64;
    }
    // The first of this lane's columns of a piece; those of group g follow 8·g later.
    __device__ __forceinline__ static int lane_column(const GemmPlace& place, int piece) {
        return column(place, piece) + threadIdx.x % 4 * 2;
    }

    // One branch per piece because registers have no run-time index.
    template <int kPiece, int kFragments, int kCount>
    __device__ __forceinline__ static void pick(float (&v)[32], const float (&d)[kFragments][kCount], int piece) {
        if constexpr (kPiece < kPieces) {
            if (piece == kPiece) {
#pragma unroll
                for (int i = 0; i < 32; ++i) v[i] = d[kPiece / kChunks][kPiece % kChunks * 32 + i];
            } else {
                pick<kPiece + 1>(v, d, piece);
            }
        }
    }

    // Bias and gates of a piece, read before the piece ahead of it is put away.
    __device__ __forceinline__ void read_columns(const GemmPlace& place, int first, int piece) {
        const GemmSm90Params& p = group.problem[place.product];
        const int column = lane_column(place, piece);
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            const bool inside = p.bias != nullptr && column + 8 * g < p.n;
            bias[g] = inside ? *reinterpret_cast<const uint32_t*>(p.bias + column + 8 * g) : 0;
        }
        if (p.epilogue == kGatedAccumulate) {
            read_gate(p, row(place, first, piece) + threadIdx.x % 32 / 4, column);
        }
    }
    __device__ __forceinline__ void read_gate(const GemmSm90Params& p, int row, int column) {
        const float* from = p.gate + p.groups.sample_of(row) * p.ld_gate + column;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            factor[g] = column + 8 * g < p.n ? *reinterpret_cast<const float2*>(from + 8 * g) : make_float2(0, 0);
        }
    }

    __device__ __forceinline__ void add_bias(float (&v)[32]) const {
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            const float low = __uint_as_float(bias[g] << 16), high = __uint_as_float(bias[g] & 0xffff0000u);
            v[4 * g] += low, v[4 * g + 1] += high, v[4 * g + 2] += low, v[4 * g + 3] += high;
        }
    }
    // The lower of a lane's two rows may belong to another sample than the upper.
    __device__ __forceinline__ void multiply_gate(float (&v)[32], const GemmPlace& place, int first, int piece) {
        const GemmSm90Params& p = group.problem[place.product];
        const int upper = row(place, first, piece) + threadIdx.x % 32 / 4;
#pragma unroll
        for (int g = 0; g < 8; ++g) v[4 * g] *= factor[g].x, v[4 * g + 1] *= factor[g].y;
        if (p.groups.sample_of(upper) != p.groups.sample_of(upper + 8)) {
            read_gate(p, upper + 8, lane_column(place, piece));
        }
#pragma unroll
        for (int g = 0; g < 8; ++g) v[4 * g + 2] *= factor[g].x, v[4 * g + 3] *= factor[g].y;
    }

    // Whether a tile has heads to rotate.
    __device__ __forceinline__ bool rotates(const GemmPlace& place) const {
        const Heads& heads = group.problem[place.product].heads;
        bool any = false;
#pragma unroll
        for (int piece = 0; piece < kChunks; ++piece) any |= heads.weight_of(column(place, piece)) != nullptr;
        return any;
    }

    // The rotations of this lane's columns in its two rows of 16 from `first`, for every head. Rows
    // below the last have none; they are not stored.
    __device__ __forceinline__ void read_rotations(const GemmSm90Params& p, int first) {
        const int upper = first + threadIdx.x % 32 / 4;
        const float* const table = p.heads.table + threadIdx.x % 4 * 2;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            const float* const from = table + 8 * g;
            factor[g] = *reinterpret_cast<const float2*>(from + min(upper, p.m - 1) * p.heads.ld_table);
            factor[8 + g] = *reinterpret_cast<const float2*>(from + min(upper + 8, p.m - 1) * p.heads.ld_table);
        }
    }

    // A piece is a head; the four lanes of a quad have two of its rows.
    __device__ __forceinline__ void norm_and_rotate(float (&v)[32], const bf16* weight, float eps) const {
        float upper = 0.0f, lower = 0.0f;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            upper += v[4 * g] * v[4 * g] + v[4 * g + 1] * v[4 * g + 1];
            lower += v[4 * g + 2] * v[4 * g + 2] + v[4 * g + 3] * v[4 * g + 3];
        }
        upper = rsqrtf(quad_sum(upper) / 64 + eps);
        lower = rsqrtf(quad_sum(lower) / 64 + eps);
        const bf16* const weights = weight + threadIdx.x % 4 * 2;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(weights + 8 * g);
            const float w[2] = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
            rotate(v[4 * g], v[4 * g + 1], upper, w, factor[g]);
            rotate(v[4 * g + 2], v[4 * g + 3], lower, w, factor[8 + g]);
        }
    }
    __device__ __forceinline__ static float quad_sum(float value) {
        value += __shfl_xor_sync(~0u, value, 1);
        return value + __shfl_xor_sync(~0u, value, 2);
    }
    __device__ __forceinline__ static void rotate(float& even, float& odd, float inverse, const float (&weight)[2],
                                                  float2 by) {
        const float a = even * inverse * weight[0], b = odd * inverse * weight[1];
        even = a * by.x - b * by.y;
        odd = a * by.y + b * by.x;
    }

    // Makes the box of `piece` free once more, and full where there is something to add to.
    __device__ __forceinline__ void reuse(const GemmPlace& place, int first, int piece) {
        const GemmSm90Params& p = group.problem[place.product];
        if (threadIdx.x % 32 == 0) {
            box_stores_read<Tile::kBuffers - 1>();
            if (p.epilogue != kStore) {
                barrier_expect(barrier, Tile::kBufferBytes);
                copy_box_2d(shared_address(buffer(piece)), &p.c, barrier, column(place, piece),
                            row(place, first, piece));
            }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void put(float (&v)[32], int piece, bool adds) {
        const int lane = threadIdx.x % 32;
        uint8_t* const rows = buffer(piece) + lane / 4 * 128 + lane % 4 * 4;
#pragma unroll
        for (int g = 0; g < 8; ++g) {
            uint32_t* const upper = reinterpret_cast<uint32_t*>(rows + ((g ^ lane / 4) << 4));
            uint32_t* const lower = upper + 8 * 128 / 4;
            if (adds) {
                const uint32_t a = *upper, b = *lower;
                v[4 * g] += __uint_as_float(a << 16), v[4 * g + 1] += __uint_as_float(a & 0xffff0000u);
                v[4 * g + 2] += __uint_as_float(b << 16), v[4 * g + 3] += __uint_as_float(b & 0xffff0000u);
            }
            *upper = pack_bf16(v[4 * g], v[4 * g + 1]);
            *lower = pack_bf16(v[4 * g + 2], v[4 * g + 3]);
        }
    }

    const GemmGroup& group;
    uint8_t* const staging;
    const uint32_t barrier;
    uint32_t parity = 0;
    uint32_t bias[8];
    // The gates of eight pairs of columns, or (cos, sin) of these in the upper row and then in the lower.
    float2 factor[kHeads ? 16 : 8];
};

template <class Tile, typename Out, bool kHeads>
struct Gemm {
    const GemmGroup& group;

    using Place = GemmPlace;
    using Finish = std::conditional_t<(Tile::kBuffers > 0), BoxFinish<Tile, kHeads>, StagedFinish<Tile, Gemm>>;

    __device__ __forceinline__ int tiles() const { return group.end; }

    __device__ __forceinline__ Place place(int tile, int rank) const {
        constexpr int kRows = Tile::kRows * Tile::kCluster;
        const int product = group.of(tile);
        const GemmSm90Params& p = group.problem[product];
        const TilePosition at(tile - group.first[product], (p.m + kRows - 1) / kRows,
                              (p.n + Tile::kCols - 1) / Tile::kCols);
        const int row = Tile::kSplit > 1 ? at.row : at.row * Tile::kCluster + rank;
        return {product, row * p.tile_rows, at.column * Tile::kCols, Tile::kSplit > 1 ? rank : 0};
    }
    __device__ __forceinline__ int column(const Place& place) const { return place.column; }
    __device__ __forceinline__ int rows(const Place& place) const { return group.problem[place.product].tile_rows; }
    // The first step of part `part` of a tile; of the part after the last it is their number.
    __device__ __forceinline__ int first_step(const Place& place, int part) const {
        const int all = (group.problem[place.product].k + Tile::kDepth - 1) / Tile::kDepth;
        return all * part / Tile::kSplit;
    }
    __device__ __forceinline__ int steps(const Place& place) const {
        return first_step(place, place.part + 1) - first_step(place, place.part);
    }
    __device__ __forceinline__ const TensorMap* columns_map(const Place& place) const {
        return &group.problem[place.product].b;
    }

    template <class Step>
    __device__ __forceinline__ void each_step(const Place& place, const Step& step) const {
        const GemmSm90Params& p = group.problem[place.product];
        const int end = first_step(place, place.part + 1) * Tile::kDepth;
        for (int k = first_step(place, place.part) * Tile::kDepth; k < end; k += Tile::kDepth) {
            step([&](uint32_t to, uint32_t barrier) { copy_box_2d(to, &p.a, barrier, k, place.row); }, k);
        }
    }

    // Lane l finishes columns 8·(l % 8).. of rows l / 8 + 4·i.
    template <class Stage>
    __device__ __forceinline__ void finish(const Place& place, int tile_row, int tile_column,
                                           const Stage& stage, const float* staging) const {
        const GemmSm90Params& p = group.problem[place.product];
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

template <class Tile, typename Out, bool kHeads>
__device__ __forceinline__ void gemm(const GemmGroup& group) {
    if (threadIdx.x == 0) {
        const GemmSm90Params& p = group.problem[group.of(blockIdx.x / Tile::kBlocks)];
        prefetch_tensor_map(&p.a);
        prefetch_tensor_map(&p.b);
    }
    multiply_tiles<Tile>(Gemm<Tile, Out, kHeads>{group});
}

// Entry points; __launch_bounds__(…, 1) is what lets the warpgroups share out the registers anew. Norms of
// heads are in kernels of their own: their registers and their code are for nobody else.
#define GEMM_ENTRY(name, attributes, Out, heads, ...)                              \
    extern "C" __global__ void attributes __launch_bounds__(384, 1)                \
        name(const __grid_constant__ GemmGroup group) {                            \
        gemm<Tile<__VA_ARGS__>, Out, heads>(group);                                \
    }
#define GEMM_KERNEL(name, ...)                                                     \
    GEMM_ENTRY(name, , bf16, false, __VA_ARGS__)                                   \
    GEMM_ENTRY(name##_heads, , bf16, true, __VA_ARGS__)
// Of blocks that share loads of columns, or the inner dimension of a tile.
#define GEMM_CLUSTER_KERNEL(name, blocks, ...)                                     \
    GEMM_ENTRY(name, __cluster_dims__(blocks, 1, 1), bf16, false, __VA_ARGS__)     \
    GEMM_ENTRY(name##_heads, __cluster_dims__(blocks, 1, 1), bf16, true, __VA_ARGS__)

// Blocks of a cluster; rows, columns, blocks that share loads, whether consumers take tiles in turn, boxes of a warp,
// parts of k.
GEMM_CLUSTER_KERNEL(gemm_sm90_128x128_pair, 2, 128, 128, 2, true, 2)
GEMM_KERNEL(gemm_sm90_128x192, 128, 192, 1, false, 3)
GEMM_CLUSTER_KERNEL(gemm_sm90_64x192_pair, 2, 64, 192, 2, true, 1)
GEMM_KERNEL(gemm_sm90_64x64, 64, 64, 1, true, 1)
GEMM_KERNEL(gemm_sm90_128x64, 128, 64, 1, false, 1)
GEMM_CLUSTER_KERNEL(gemm_sm90_128x64_split2, 2, 128, 64, 1, false, 1, 2)
GEMM_CLUSTER_KERNEL(gemm_sm90_128x64_split4, 4, 128, 64, 1, false, 1, 4)
GEMM_ENTRY(gemm_sm90_128x128_f32, , float, false, 128, 128, 1)
GEMM_ENTRY(gemm_sm90_128x64_f32, , float, false, 128, 64, 1)
