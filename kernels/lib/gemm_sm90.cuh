// The matrix product of sm_90a that the linear layers and the convolutions share: out tiles of
// kRows × kCols, bf16 operands that bulk copies bring to shared memory, f32 accumulators.
//
// A block is three warpgroups. The last one is the producer: one thread keeps a ring of stages
// full, each stage 64 values of k for all rows of the tile and for all its columns, written with
// the 128-byte swizzle. The other two are consumers, which hand a stage back once its products have
// ended, one step later, so that the tensor cores always have a step queued. The grid is persistent:
// a block takes tiles blockIdx, blockIdx + gridDim, …, and the producer runs ahead into the next tile.
//
// The consumers either share each tile, half of the rows each (least reading per product), or take
// whole tiles in turn (kPingPong): while one stores its tile the other multiplies, which hides the
// end of a tile where k is short. A consumer may start on its stages only when the other has seen all
// of its own arrive: by the parity of a phase one cannot tell it from the phase two later.
//
// Two blocks of a cluster (kCluster = 2) take neighbouring row tiles of the same columns; each
// brings half of the columns' values and sends them to both, which halves that part of the reads
// from L2. A stage is then free only when the consumers of both blocks have handed it back.
//
// Where there are few tiles, kSplit blocks of a cluster share each: every one multiplies its part of the
// inner dimension for the whole tile and finishes the rows of some of its warps, for which the others
// write their sums to its shared memory and it adds them up in the order of the parts. A block has one
// tile then, no more.
//
// What differs is a `Problem` with
//   struct Place;                           where a tile lies
//   int tiles()                             number of tiles (of pairs of tiles for kCluster = 2)
//   Place place(int tile, int rank)
//   int rows(const Place&)                  that the tile has, a multiple of 16 up to kRows: so many are copied,
//                                           and Finish is called for no warp that has none of them
//   int steps(const Place&)                 k-steps, equal for both blocks of a pair, at least 1
//   void each_step(const Place&, step)      calls step(copy_rows, k) for each, where
//                                           copy_rows(to, barrier) issues the copy of the rows' part
//                                           and k is the first value of the columns' part
//   int column(const Place&)                first column
//   const TensorMap* columns_map(const Place&)  2-D over (k, column), box 64 × kCols / kCluster
//   class Finish                            what one warp does with its rows of a tile:
//     Finish(const Problem&, shared, warp)
//     void ahead(const Place&, row)         called once per tile among its first steps
//     void finish(const Place&, row, d)     stores the sums of the 16 rows from `row` of the tile and,
//                                           for each further fragment, those 64 below
//     void drain()                          at the end of the block
// StagedFinish is one of these.
#pragma once

#include "hopper.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

// kBuffers_ is what Finish keeps for each warp: boxes of 16 rows × 64 columns of bf16, or if 0 one of f32.
template <int kRows_, int kCols_, int kCluster_, bool kPingPong_ = false, int kBuffers_ = 0, int kSplit_ = 1>
struct Tile {
    static constexpr int kRows = kRows_;
    static constexpr int kCols = kCols_;
    static constexpr int kCluster = kCluster_;
    static constexpr int kDepth = 64;
    static constexpr int kSplit = kSplit_;
    static constexpr int kBlocks = kCluster * kSplit;  // of a cluster as it is launched
    static constexpr bool kPingPong = kPingPong_;
    static constexpr int kConsumers = 2;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    // Consumers that read each stage, and products of 64 rows that one of them holds.
    static constexpr int kReaders = kPingPong ? 1 : kConsumers;
    static constexpr int kFragments = kRows / (64 * kReaders);
    static constexpr int kRowBytes = kDepth * 2;
    static constexpr int kBytesA = kRows * kRowBytes;
    static constexpr int kBytesB = kCols * kRowBytes;
    static constexpr int kStageBytes = kBytesA + kBytesB;
    static constexpr int kWarps = 4 * kConsumers;
    static constexpr int kBuffers = kBuffers_;
    static constexpr int kBufferBytes = 16 * 64 * 2;
    static constexpr int kStagingFloats = 16 * 64;
    static constexpr int kStagingBytes = kWarps * (kBuffers > 0 ? kBuffers * kBufferBytes : kStagingFloats * 4);
    static constexpr int kMostShared = 227 * 1024;
    // Sums of a warp, and what the other blocks of a tile send to those warps that finish their rows.
    static constexpr int kWarpBytes = kRows * kCols * 4 / kWarps;
    static constexpr int kPartsBytes = (kSplit - 1) * kWarps / kSplit * kWarpBytes;
    // As many as there is room for beside 384 bytes of barriers.
    static constexpr int kStages = (kMostShared - kStagingBytes - kPartsBytes - 384) / kStageBytes;
    static constexpr int kStaging = kStages * kStageBytes;
    static constexpr int kParts = kStaging + kStagingBytes;
    static constexpr int kBarriers = kParts + kPartsBytes;
    static constexpr int kWarpBarriers = kBarriers + 2 * 8 * kStages;
    static constexpr int kSharedBytes = kWarpBarriers + (kBuffers > 0 ? 8 * kWarps : 0);
    // 168 registers per thread at launch, shared out anew: 40 · 128 + 232 · 256 = 168 · 384.
    static constexpr int kProducerRegisters = kPingPong ? 24 : 40;
    static constexpr int kConsumerRegisters = kPingPong ? 240 : 232;
    static_assert(kStages >= 4 && kBarriers % 8 == 0 && kSharedBytes <= kMostShared);
    static_assert(kSplit == 1 || (kCluster == 1 && !kPingPong && kWarps % kSplit == 0));
    static_assert(kRows % (64 * kReaders) == 0 && kCols % 64 == 0 && kStageBytes % 1024 == 0);
};

// The position of one side (producer or consumer) in the ring.
template <class Tile>
struct Ring {
    uint32_t base;
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ uint32_t a() const { return base + stage * Tile::kStageBytes; }
    __device__ __forceinline__ uint32_t b() const { return a() + Tile::kBytesA; }
    __device__ __forceinline__ uint32_t full() const { return base + Tile::kBarriers + 8 * stage; }
    __device__ __forceinline__ uint32_t empty() const { return full() + 8 * Tile::kStages; }
    __device__ __forceinline__ void advance() {
        if (++stage == Tile::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void skip(int steps) {
        const int to = stage + steps;
        parity ^= to / Tile::kStages & 1;
        stage = to % Tile::kStages;
    }
};

// Where tile number `tile` of rows × columns lies. The order goes down bands of kBand tile rows,
// column by column, so that tiles worked on at one time share both operands in L2.
struct TilePosition {
    static constexpr int kBand = 8;
    int row, column;

    __device__ __forceinline__ TilePosition(int tile, int rows, int columns) {
        const int band = tile / (kBand * columns);
        const int within = tile - band * (kBand * columns);
        const int height = min(kBand, rows - band * kBand);
        column = within / height;
        row = band * kBand + within - column * height;
    }
};

// The staging area of a warp: 16 rows × 64 columns of f32 in two planes of 16 × 32, plane p holding
// of each group of 8 columns the four from 4p. In row r of plane p the four values of group g lie at
// chunk g ^ (r % 4 + 4p). The writes of `stage_chunk` (8 bytes per lane, accumulator layout) and the
// reads of `staged_group` (16 bytes per lane) then meet no bank twice.
struct Staging {
    static constexpr int kPlane = 16 * 32;

    // The place of column `column` (0 to 63) of row `row`.
    static __device__ __forceinline__ int index(int row, int column) {
        const int plane = column / 4 % 2;
        const int group = column / 8 ^ (row % 4 + 4 * plane);
        return plane * kPlane + row * 32 + group * 4 + column % 4;
    }
};

// Puts columns 64·kChunk.. of a fragment into the warp's staging area.
template <int kChunk, int kCount>
__device__ __forceinline__ void stage_chunk(float* staging, const float (&d)[kCount]) {
    const int lane = threadIdx.x % 32;
    const int first = Staging::index(lane / 4, 2 * (lane % 4));
#pragma unroll
    for (int g = 0; g < 8; ++g) {
        // Group g differs from group 0 in the chunk bits only.
        float* to = staging + (first ^ (4 * g));
        const float* from = d + kChunk * 32 + g * 4;
        *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
        *reinterpret_cast<float2*>(to + 8 * 32) = make_float2(from[2], from[3]);
    }
}

// Puts piece number `piece` into the staging area: pieces are the groups of 64 columns of the first
// fragment, then of the next. A chain of branches because registers have no run-time index.
template <int kPiece, int kFragments, int kCount>
__device__ __forceinline__ void stage_piece(float* staging, const float (&d)[kFragments][kCount], int piece) {
    constexpr int kChunks = kCount / 32;
    if constexpr (kPiece < kFragments * kChunks) {
        if (piece == kPiece) {
            stage_chunk<kPiece % kChunks>(staging, d[kPiece / kChunks]);
        } else {
            stage_piece<kPiece + 1>(staging, d, piece);
        }
    }
}

// The 8 columns from 8·group of a staged row.
__device__ __forceinline__ void staged_group(float (&v)[8], const float* staging, int row, int group) {
    const float4 low = *reinterpret_cast<const float4*>(staging + Staging::index(row, 8 * group));
    const float4 high = *reinterpret_cast<const float4*>(staging + Staging::index(row, 8 * group + 4));
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// Stores go through 4 KiB of shared memory per warp in f32, 16 rows × 64 columns at a time, after
// which each lane owns 8 values that belong side by side in the output. The Problem has
//   void finish(const Place&, row, column, stage, staging)
// which stores the 16 rows from `row` and 64 columns from `column` of the tile; it calls stage()
// once, which puts them into `staging`.
template <class Tile, class Problem>
class StagedFinish {
public:
    __device__ __forceinline__ StagedFinish(const Problem& problem, uint8_t* shared, int warp)
        : problem(problem),
          staging(reinterpret_cast<float*>(shared + Tile::kStaging) + warp * Tile::kStagingFloats) {}

    template <class Place>
    __device__ __forceinline__ void ahead(const Place&, int) {}

    template <class Place, int kFragments, int kCount>
    __device__ __forceinline__ void finish(const Place& place, int row, const float (&d)[kFragments][kCount]) {
        constexpr int kChunks = kCount / 32;
        // Not unrolled: the epilogue is long, and only the staging depends on the registers' names.
#pragma unroll 1
        for (int piece = 0; piece < kFragments * kChunks; ++piece) {
            problem.finish(
                place, row + piece / kChunks * 64, piece % kChunks * 64,
                [&] {
                    __syncwarp();
                    stage_piece<0>(staging, d, piece);
                    __syncwarp();
                },
                staging);
        }
    }

    __device__ __forceinline__ void drain() {}

private:
    const Problem& problem;
    float* const staging;
};

// Eight neighbouring values as they lie in memory; zeros until read.
template <typename T>
struct Octet;

template <>
struct Octet<bf16> {
    uint4 bits = make_uint4(0, 0, 0, 0);

    __device__ __forceinline__ void read(const bf16* from) { bits = *reinterpret_cast<const uint4*>(from); }
    __device__ __forceinline__ void write(bf16* to) const { *reinterpret_cast<uint4*>(to) = bits; }
    __device__ __forceinline__ void add_to(float (&v)[8]) const {
        const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] += __uint_as_float(pairs[i] << 16);
            v[2 * i + 1] += __uint_as_float(pairs[i] & 0xffff0000u);
        }
    }
    __device__ __forceinline__ void round(const float (&v)[8]) {
        bits = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                          pack_bf16(v[6], v[7]));
    }
};

template <>
struct Octet<float> {
    float4 low = make_float4(0, 0, 0, 0), high = make_float4(0, 0, 0, 0);

    __device__ __forceinline__ void read(const float* from) {
        low = reinterpret_cast<const float4*>(from)[0];
        high = reinterpret_cast<const float4*>(from)[1];
    }
    __device__ __forceinline__ void write(float* to) const {
        reinterpret_cast<float4*>(to)[0] = low;
        reinterpret_cast<float4*>(to)[1] = high;
    }
    __device__ __forceinline__ void add_to(float (&v)[8]) const {
        v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
        v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
    }
    __device__ __forceinline__ void multiply(float (&v)[8]) const {
        v[0] *= low.x, v[1] *= low.y, v[2] *= low.z, v[3] *= low.w;
        v[4] *= high.x, v[5] *= high.y, v[6] *= high.z, v[7] *= high.w;
    }
    __device__ __forceinline__ void round(const float (&v)[8]) {
        low = make_float4(v[0], v[1], v[2], v[3]);
        high = make_float4(v[4], v[5], v[6], v[7]);
    }
};

// Brings the values of the columns for the ring's present stage, from `k` on.
template <class Tile>
__device__ __forceinline__ void copy_columns(const Ring<Tile>& ring, const TensorMap* map, int k, int column,
                                             int rank) {
    if constexpr (Tile::kCluster == 1) {
        copy_box_2d(ring.b(), map, ring.full(), k, column);
    } else {
        copy_box_2d_multicast(ring.b() + rank * (Tile::kBytesB / Tile::kCluster), map, ring.full(), k,
                              column + rank * (Tile::kCols / Tile::kCluster), (1 << Tile::kCluster) - 1);
    }
}

template <class Tile, class Problem>
__device__ __forceinline__ void produce(const Problem& problem, uint32_t shared, int rank) {
    Ring<Tile> ring{shared};
    const int step_of_tiles = gridDim.x / Tile::kBlocks;
    const int first_tile = blockIdx.x / Tile::kBlocks;
    // Stages whose columns are under way before their rows may be read: weights were there before.
    int ahead = 0;
    if (first_tile < problem.tiles()) {
        const typename Problem::Place place = problem.place(first_tile, rank);
        const int column = problem.column(place);
        const int stage_bytes = Tile::kBytesB + problem.rows(place) * Tile::kRowBytes;
        Ring<Tile> filled{shared};
        problem.each_step(place, [&](const auto&, int k) {
            if (ahead == Tile::kStages) return;
            barrier_expect(filled.full(), stage_bytes);
            copy_columns<Tile>(filled, problem.columns_map(place), k, column, rank);
            filled.advance();
            ++ahead;
        });
    }
    after_predecessor();
    for (int tile = first_tile; tile < problem.tiles(); tile += step_of_tiles) {
        const typename Problem::Place place = problem.place(tile, rank);
        const int column = problem.column(place);
        const int stage_bytes = Tile::kBytesB + problem.rows(place) * Tile::kRowBytes;
        problem.each_step(place, [&](const auto& copy_rows, int k) {
            if (ahead > 0) {
                --ahead;
                copy_rows(ring.a(), ring.full());
            } else {
                barrier_wait(ring.empty(), ring.parity ^ 1);
                barrier_expect(ring.full(), stage_bytes);
                copy_rows(ring.a(), ring.full());
                copy_columns<Tile>(ring, problem.columns_map(place), k, column, rank);
            }
            ring.advance();
        });
    }
}

// One arrival per warp and block of the cluster.
template <class Tile>
__device__ __forceinline__ void hand_back(uint32_t empty) {
    const int lane = threadIdx.x % 32;
    if constexpr (Tile::kCluster == 1) {
        if (lane == 0) barrier_arrive(empty);
    } else {
        if (lane < Tile::kCluster) barrier_arrive_at(empty, lane);
    }
}

// The block of a tile's cluster that finishes the rows of a warp.
template <class Tile>
__device__ __forceinline__ int finisher(int warp) {
    return warp % Tile::kSplit;
}

// Adds up what the warps of all blocks of a tile found for the same rows, where these are finished, if the
// tile has such rows.
template <class Tile, int kFragments, int kCount>
__device__ __forceinline__ void add_parts(float (&d)[kFragments][kCount], uint8_t* shared, int rank, int warp,
                                          bool rows) {
    // Four values of each lane of the warp side by side.
    constexpr int kFours = kFragments * kCount / 4;
    static_assert(kFours * 32 * 16 == Tile::kWarpBytes);
    const int first = Tile::kParts + warp / Tile::kSplit * (Tile::kSplit - 1) * Tile::kWarpBytes +
                      static_cast<int>(threadIdx.x) % 32 * 16;
    // Where a part lies that is not the finisher's own.
    const auto place = [&](int part, int to) { return first + (part < to ? part : part - 1) * Tile::kWarpBytes; };
    const int to = finisher<Tile>(warp);
    cluster_wait();
    if (rows && rank != to) {
        const uint32_t at = shared_address(shared) + place(rank, to);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float* const v = &d[4 * i / kCount][4 * i % kCount];
            store_at(at + i * 32 * 16, to, make_float4(v[0], v[1], v[2], v[3]));
        }
    }
    cluster_sync();
    if (!rows || rank != to) return;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
        float* const v = &d[4 * i / kCount][4 * i % kCount];
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int part = 0; part < Tile::kSplit; ++part) {
            float4 add = make_float4(v[0], v[1], v[2], v[3]);
            if (part != rank) add = *reinterpret_cast<const float4*>(shared + place(part, rank) + i * 32 * 16);
            sum.x += add.x, sum.y += add.y, sum.z += add.z, sum.w += add.w;
        }
        v[0] = sum.x, v[1] = sum.y, v[2] = sum.z, v[3] = sum.w;
    }
}

template <class Tile, class Problem>
__device__ __forceinline__ void consume(const Problem& problem, uint8_t* shared, int rank, int consumer) {
    Ring<Tile> ring{shared_address(shared)};
    const int warp = warp_uniform(threadIdx.x / 32);
    // First row of this consumer and of this warp in a tile.
    const int consumer_row = Tile::kPingPong ? 0 : consumer * 64 * Tile::kFragments;
    const int warp_row = consumer_row + warp % 4 * 16;
    typename Problem::Finish finish(problem, shared, warp);
    float d[Tile::kFragments][Tile::kCols / 2];

    after_predecessor();
    const int step_of_tiles = gridDim.x / Tile::kBlocks;
    bool mine = consumer == 1;
    for (int tile = blockIdx.x / Tile::kBlocks; tile < problem.tiles(); tile += step_of_tiles) {
        const typename Problem::Place place = problem.place(tile, rank);
        const int steps = problem.steps(place);
        const bool has_rows = warp_row < problem.rows(place);
        const bool finishes = has_rows && (Tile::kSplit == 1 || rank == finisher<Tile>(warp));
        if constexpr (Tile::kPingPong) {
            mine = !mine;
            if (!mine) {
                ring.skip(steps);
                continue;
            }
            if (tile >= step_of_tiles) named_barrier_sync(1 + consumer, 256);
        }
        // Late enough that the stores of the tile before have read shared memory.
        const int ahead = min(2, steps - 1);
        uint32_t previous = 0;
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) wgmma_pin(d[f]);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            barrier_wait(ring.full(), ring.parity);
            const uint64_t a = descriptor::k_major(ring.a() + consumer_row * Tile::kRowBytes);
            const uint64_t b = descriptor::k_major(ring.b());
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < Tile::kDepth / 16; ++k) {
#pragma unroll
                for (int f = 0; f < Tile::kFragments; ++f) {
                    Wgmma<Tile::kCols>::template ss<false>(
                        d[f], descriptor::advance(a, f * 64 * Tile::kRowBytes + k * 32),
                        descriptor::advance(b, k * 32), step > 0 || k > 0);
                }
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) hand_back<Tile>(previous);
            previous = ring.empty();
            ring.advance();
            if (step == ahead && finishes) finish.ahead(place, warp_row);
        }
        // The turn of the other consumer, where there is a further tile.
        if constexpr (Tile::kPingPong) {
            if (tile + step_of_tiles < problem.tiles()) named_barrier_arrive(2 - consumer, 256);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) wgmma_pin(d[f]);
        hand_back<Tile>(previous);
        if constexpr (Tile::kSplit > 1) add_parts<Tile>(d, shared, rank, warp, has_rows);
        if (finishes) finish.finish(place, warp_row, d);
    }
    finish.drain();
}

// The whole kernel: kThreads threads, kSharedBytes of dynamic shared memory, a grid of at most as
// many blocks as run at once, a multiple of kCluster; for kSplit > 1 of kSplit blocks for each tile.
template <class Tile, class Problem>
__device__ __forceinline__ void multiply_tiles(const Problem& problem) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int warpgroup = warp_uniform(threadIdx.x / 128);
    const int rank = blockIdx.x % Tile::kBlocks;
    if (threadIdx.x == 0) {
        Ring<Tile> ring{base};
        for (; ring.parity == 0; ring.advance()) {
            barrier_init(ring.full(), 1);
            barrier_init(ring.empty(), 4 * Tile::kReaders * Tile::kCluster);
        }
        if constexpr (Tile::kBuffers > 0) {
            for (int i = 0; i < Tile::kWarps; ++i) barrier_init(base + Tile::kWarpBarriers + 8 * i, 1);
        }
        barrier_init_fence();
    }
    if constexpr (Tile::kCluster > 1) {
        cluster_sync();
    } else {
        __syncthreads();
        // Awaited before sums are sent.
        if constexpr (Tile::kSplit > 1) cluster_arrive();
    }
    if (warpgroup == Tile::kConsumers) {
        lower_registers<Tile::kProducerRegisters>();
        if (warp_uniform(threadIdx.x / 32) == 4 * Tile::kConsumers && elect_one()) {
            produce<Tile>(problem, base, rank);
        }
        __syncwarp();
        // As in add_parts.
        if constexpr (Tile::kSplit > 1) {
            cluster_wait();
            cluster_sync();
        }
    } else {
        raise_registers<Tile::kConsumerRegisters>();
        consume<Tile>(problem, shared, rank, warpgroup);
    }
    // Copies and arrivals of the other block still reach this one until its consumers have ended.
    if constexpr (Tile::kCluster > 1) cluster_sync();
}
