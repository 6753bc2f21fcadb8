// One tile of a matrix product on the tensor cores of sm_80 and newer: sums of x·wᵀ for
// Tile::kM rows of x and Tile::kN rows of w, both with the inner dimension contiguous.
//
// Slices of Tile::kDepth of the inner dimension pass through a ring of shared-memory stages,
// filled by asynchronous copies kStages - 1 slices ahead. Where the rows of x come from is the
// business of a row source: a class whose fetch(stage) starts this thread's share of the copies
// of the next slice, zeros beyond the last. MatrixRows reads a plain matrix; a convolution
// gathers pixels.
//
// A stage holds one line of kDepth elements per row, in chunks of 16 bytes, and the chunks of a
// line are permuted by the row number (slot_of): then the eight rows that a ldmatrix reads, and
// the rows that a warp writes, fall into different banks without padding.
//
// Warps form a kM/kWarpM × kN/kWarpN grid. Fragments are double buffered: those of the next
// sixteen columns are loaded while the current ones are multiplied, across stages too, so one
// barrier per slice is all the waiting there is.
#pragma once

#include "mma.cuh"

template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kDepth_, int kStages_>
struct Tile {
    static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
    static constexpr int kDepth = kDepth_, kStages = kStages_;
    static constexpr int kWarpColumns = kN / kWarpN;
    static constexpr int kThreads = 32 * (kM / kWarpM) * kWarpColumns;
    static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // of a warp

    static constexpr int kChunks = kDepth / 8;  // 16-byte chunks of a line
    static constexpr int kLine = kDepth * 2;    // bytes
    static constexpr int kStage = (kM + kN) * kLine;

    // On the way out a warp passes its sums through a slab of at most 32 rows; lines are
    // padded by eight floats, so that the fragments of eight rows fall into different banks.
    static constexpr int kSlabRows = kWarpM < 32 ? kWarpM : 32;
    static constexpr int kSlabLine = kWarpN + 8;  // floats
    static constexpr int kSlab = kSlabRows * kSlabLine * 4;

    static constexpr int kShared = kStages * kStage;
    static_assert(kThreads / 32 * kSlab <= kShared, "the slabs take the place of the stages");
    static_assert(kDepth == 32 || kDepth == 64, "as slot_of assumes");
    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kStages >= 2, "as the loads assume");
    static_assert(kStage % 128 == 0 && kThreads % (8 * kChunks) == 0, "as the copies assume");

    // Byte offset of a chunk. Lines of 128 bytes: eight rows permute eight chunks. Lines of
    // 64 bytes: two rows share the 128 bytes of all banks, so pairs of rows permute four.
    static __device__ __forceinline__ int slot_of(int row, int chunk) {
        const int turn = kDepth == 64 ? row % 8 : row / 2 % 4;
        return row * kLine + ((chunk ^ turn) << 4);
    }
};

// The tiles there are. Warps take 64×64 where there is room: the largest square whose sums fit
// into registers beside two sets of fragments, so with the least shared-memory traffic per
// product. Three stages of 32 columns leave room for two blocks of 128×128 on devices with
// 100 KB of shared memory: while one waits or stores, the other multiplies. Small tiles do
// little work per byte and get more or deeper stages instead.
//                      M    N  warp M  N  depth stages
using Tile256x128 = Tile<256, 128, 64, 64, 32, 3>;
using Tile128x128 = Tile<128, 128, 64, 64, 32, 3>;
using Tile128x64 = Tile<128, 64, 64, 32, 32, 4>;
using Tile64x64 = Tile<64, 64, 32, 32, 64, 3>;
using Tile16x64 = Tile<16, 64, 16, 16, 64, 4>;
using Tile128x32 = Tile<128, 32, 32, 32, 32, 4>;
using Tile128x16 = Tile<128, 16, 32, 16, 32, 4>;
static_assert(Tile256x128::kShared == 73728 && Tile256x128::kThreads == 256, "as on the host");
static_assert(Tile128x128::kShared == 49152 && Tile128x128::kThreads == 128, "as on the host");
static_assert(Tile128x64::kShared == 49152 && Tile128x64::kThreads == 128, "as on the host");
static_assert(Tile64x64::kShared == 49152 && Tile64x64::kThreads == 128, "as on the host");
static_assert(Tile16x64::kShared == 40960 && Tile16x64::kThreads == 128, "as on the host");
static_assert(Tile128x32::kShared == 40960 && Tile128x32::kThreads == 128, "as on the host");
static_assert(Tile128x16::kShared == 36864 && Tile128x16::kThreads == 128, "as on the host");

// Which tile of an m × n output a block computes. Consecutive blocks walk down a strip of up
// to eight tiles before the next column of tiles: the blocks that run at the same time then
// form a compact rectangle and share its rows and columns in L2.
struct TilePlace {
    int row, column;
};

template <typename Tile>
__device__ __forceinline__ TilePlace place_of_block(int m, int n) {
    constexpr int kStrip = 8;
    const int down = (m + Tile::kM - 1) / Tile::kM;
    const int across = (n + Tile::kN - 1) / Tile::kN;
    const int block = blockIdx.x;
    const int strip = block / (kStrip * across);
    const int in_strip = block - strip * kStrip * across;
    const int left = down - strip * kStrip;
    const int height = left < kStrip ? left : kStrip;
    const int column = in_strip / height;
    return {(strip * kStrip + in_strip - column * height) * Tile::kM, column * Tile::kN};
}

// Row source: kRows rows of a matrix from `first` on, zeros below its last row and beyond its
// last column. Columns come in whole chunks: their number is a multiple of eight.
template <typename Tile, int kRows>
class MatrixRows {
public:
    __device__ __forceinline__ MatrixRows(const bf16* matrix, int64_t stride, int first, int rows,
                                          int columns) {
        const int row = threadIdx.x / Tile::kChunks;
        const int chunk = threadIdx.x % Tile::kChunks;
        from = matrix + (first + row) * stride + chunk * 8;
        pass = kPassRows * stride;
        left = columns - chunk * 8;
        to = Tile::slot_of(row, chunk);
        rows_left = rows - first - row;
    }

    __device__ __forceinline__ void fetch(uint32_t stage) {
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            if (kRows % kPassRows != 0 && threadIdx.x / Tile::kChunks + i * kPassRows >= kRows) {
                break;
            }
            copy_async_16(stage + to + i * kPassRows * Tile::kLine, from + i * pass,
                          left > 0 && i * kPassRows < rows_left);
        }
        from += Tile::kDepth;
        left -= Tile::kDepth;
    }

private:
    // The block's threads cover kPassRows rows at a time, each thread always the same chunk.
    static constexpr int kPassRows = Tile::kThreads / Tile::kChunks;
    static constexpr int kPasses = (kRows + kPassRows - 1) / kPassRows;

    const bf16* from;  // this thread's chunk of the next slice, in its first row
    int64_t pass;      // elements between its rows
    int left;          // columns from there on
    int rows_left;     // rows of the matrix from its first row on
    uint32_t to;
};

// What a warp multiplies at a time: sixteen columns of its rows of x and w.
template <typename Tile>
struct Fragments {
    uint32_t x[Tile::kTilesM][4];
    uint32_t w[Tile::kTilesN / 2][4];

    // `x_line` and `w_line` are this lane's places of the first sixteen columns. A line is
    // aligned to its length, so the k-th sixteen columns differ in two bits of the chunk only,
    // which the permutation leaves to be flipped.
    __device__ __forceinline__ void load(uint32_t x_line, uint32_t w_line, int k) {
#pragma unroll
        for (int i = 0; i < Tile::kTilesM; ++i) {
            load_matrices(x[i], (x_line ^ (k * 32)) + i * 16 * Tile::kLine);
        }
#pragma unroll
        for (int j = 0; j < Tile::kTilesN / 2; ++j) {
            load_matrices(w[j], (w_line ^ (k * 32)) + j * 16 * Tile::kLine);
        }
    }
};

// The warp's sums, in the layout of multiply_accumulate.
template <typename Tile>
struct Sums {
    float values[Tile::kTilesM][Tile::kTilesN][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
            for (int j = 0; j < Tile::kTilesN; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) values[i][j][e] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void add(const Fragments<Tile>& f) {
#pragma unroll
        for (int i = 0; i < Tile::kTilesM; ++i) {
#pragma unroll
            for (int j = 0; j < Tile::kTilesN; ++j) {
                multiply_accumulate(values[i][j], f.x[i], f.w[j / 2][j % 2 * 2],
                                    f.w[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
};

// sums = x·wᵀ over `slices` slices. `shared` is aligned to 128 bytes and Tile::kShared long.
template <typename Tile, typename Rows, typename Weights>
__device__ __forceinline__ void multiply_tile(Rows& rows, Weights& weights, int slices,
                                              uint32_t shared, Sums<Tile>& sums) {
    constexpr int kSteps = Tile::kDepth / 16;
    constexpr int kAhead = Tile::kStages - 1;
    constexpr int kWeights = Tile::kM * Tile::kLine;  // offset of w in a stage
    const uint32_t end = shared + Tile::kShared;

#pragma unroll 1
    for (int s = 0; s < kAhead; ++s) {
        rows.fetch(shared + s * Tile::kStage);
        weights.fetch(shared + s * Tile::kStage + kWeights);
        commit_copies();
    }

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int x_row = warp / Tile::kWarpColumns * Tile::kWarpM + lane % 16;
    const int w_row = warp % Tile::kWarpColumns * Tile::kWarpN + lane % 8 + lane / 16 * 8;
    const uint32_t x_line = Tile::slot_of(x_row, lane / 16);
    const uint32_t w_line = Tile::slot_of(w_row, lane / 8 % 2) + kWeights;

    Fragments<Tile> fragments[2];
    uint32_t read = shared, write = shared + kAhead * Tile::kStage;
    sums.clear();
    wait_for_copies<kAhead - 1>();
    __syncthreads();
    fragments[0].load(read + x_line, read + w_line, 0);
    for (int slice = 0; slice < slices; ++slice) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            if (k == kSteps - 1) {
                // The next slice has come, and all warps have taken what they need of this one.
                wait_for_copies<kAhead - 1>();
                __syncthreads();
                read = read + Tile::kStage == end ? shared : read + Tile::kStage;
            }
            fragments[(k + 1) % 2].load(read + x_line, read + w_line, (k + 1) % kSteps);
            if (k == 0) {
                // Into the stage that everyone left at the last barrier. Beyond the last slice
                // come zeros that no one reads: cheaper than a branch among the products.
                rows.fetch(write);
                weights.fetch(write + kWeights);
                commit_copies();
                write = write + Tile::kStage == end ? shared : write + Tile::kStage;
            }
            sums.add(fragments[k % 2]);
        }
    }
}

// Hands the sums to the epilogue in rows of eight columns a thread, so that neighbouring lanes
// store neighbouring 16 bytes. `shared` is the memory of the stages.
template <typename Tile, typename Epilogue>
__device__ __forceinline__ void store_tile(const Epilogue& epilogue, TilePlace place,
                                           float* shared, const Sums<Tile>& sums) {
    constexpr int kLanes = Tile::kWarpN / 8;  // that share a line
    constexpr int kLines = 32 / kLanes;       // stored at a time
    constexpr int kPasses = (Tile::kSlabRows + kLines - 1) / kLines;
    constexpr int kBatch = kPasses < 4 ? kPasses : 4;  // with their loads under way together
    constexpr int kSlabTiles = Tile::kSlabRows / 16;
    static_assert(Tile::kSlabRows % (kBatch * kLines) == 0, "whole batches");
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    float* slab = shared + warp * (Tile::kSlab / 4);

    wait_for_copies<0>();
    __syncthreads();
    const int column = place.column + warp % Tile::kWarpColumns * Tile::kWarpN + lane % kLanes * 8;
    const Pack<float, 8> bias = epilogue.template bias<8>(column);
#pragma unroll
    for (int first = 0; first < Tile::kTilesM; first += kSlabTiles) {
#pragma unroll
        for (int i = 0; i < kSlabTiles; ++i) {
#pragma unroll
            for (int j = 0; j < Tile::kTilesN; ++j) {
                const float (&values)[4] = sums.values[first + i][j];
                float* to = slab + (i * 16 + lane / 4) * Tile::kSlabLine + j * 8 + lane % 4 * 2;
                store(to, Pack<float, 2>{values[0], values[1]});
                store(to + 8 * Tile::kSlabLine, Pack<float, 2>{values[2], values[3]});
            }
        }
        __syncwarp();
        const int row =
            place.row + warp / Tile::kWarpColumns * Tile::kWarpM + first * 16 + lane / kLanes;
#pragma unroll 1
        for (int pass = 0; pass < kPasses; pass += kBatch) {
            Pack<bf16, 8> prior[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                prior[b] = epilogue.template prior<8>(row + (pass + b) * kLines, column);
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int line = (pass + b) * kLines;
                const float* from =
                    slab + (line + lane / kLanes) * Tile::kSlabLine + lane % kLanes * 8;
                const Pack<float, 4> low = load<4>(from), high = load<4>(from + 4);
                const float values[8] = {low[0],  low[1],  low[2],  low[3],
                                         high[0], high[1], high[2], high[3]};
                epilogue.store(row + line, column, values, bias, prior[b]);
            }
        }
        __syncwarp();
    }
}
