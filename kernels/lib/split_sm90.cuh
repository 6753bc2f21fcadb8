// The matrix product of sm_90a for few rows, where whole tiles would leave multiprocessors idle: the
// blocks of a cluster (kSplits = 1, 2, 4 or 8) share the inner dimension of one tile.
//
// Each block takes every k-step of its share through a ring of its own (see gemm_sm90.cuh: the last
// warpgroup produces, each of the others multiplies 64 rows). Then the sums change hands: of the 16
// rows that a warp holds, block r of the cluster finishes those from r · 16 / kSplits. A warp sends
// the rows of block r to the same warp there, its own through the same memory, and the receiver adds
// what has come in the order of the ranks. So every block finishes as much as any other, a warp waits
// for its counterparts alone, and the order of the sums is fixed.
//
// The exchange lies where the ring was: it begins once all consumers of all blocks have multiplied
// their last stage, and a block takes one tile only. No block ends while others write to its memory,
// for its warps wait for everything that is sent to them. Where kSplits is 1 the exchange only turns
// the layout of the accumulators into one of rows.
//
// Of a warp the exchange is kSplits slots, one per sender, each kCols / 16 runs of 16 columns, each
// 16 / kSplits rows of 64 bytes. The lane that holds columns 2q, 2q + 1 and 2q + 8, 2q + 9 of a row of
// a run keeps them together at 16·q: eight lanes then write, and read, 128 bytes without a gap.
//
// The Problem is one of gemm_sm90.cuh that instead of Finish has
//   bool has_row(const Place&, row)             whether row `row` of the tile is inside of the output
//   void finish(const Place&, row, exchange)    finishes this block's share of the 16 rows from `row`;
//                                               calls exchange.wait() before the first exchange.sum
// and whose place() and steps() are those of the block's share of the inner dimension.
#pragma once

#include "epilogue.cuh"
#include "gemm_sm90.cuh"

template <int kRows_, int kCols_, int kSplits_>
struct SplitTile : StageOf<kRows_, kCols_> {
    using Stage = StageOf<kRows_, kCols_>;
    using Stage::kRows, Stage::kCols, Stage::kStageBytes, Stage::kMostShared;
    static constexpr int kSplits = kSplits_;
    static constexpr int kCluster = 1;  // blocks that share what they load
    static constexpr int kConsumers = kRows / 64;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kReaders = kConsumers;
    static constexpr int kFragments = 1;
    static constexpr int kWarps = 4 * kConsumers;
    static constexpr int kFit = (kMostShared - 512) / kStageBytes;
    static constexpr int kStages = kFit < 10 ? kFit : 10;
    static constexpr int kBarriers = kStages * kStageBytes;
    static constexpr int kWarpBarriers = kBarriers + 2 * 8 * kStages;
    static constexpr int kDrained = kWarpBarriers + 8 * kWarps;
    static constexpr int kSharedBytes = kDrained + 8;
    // Registers per thread, shared out anew: 40 · 128 + 232 · 256 = 168 · 384, 32 · 128 + 160 · 384 =
    // 128 · 512. One consumer has enough.
    static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
    // Of the 16 rows of a warp, those that one block finishes; bytes of one sender and of all.
    static constexpr int kShare = 16 / kSplits;
    static constexpr int kSlotBytes = kShare * kCols * 4;
    static constexpr int kExchangeBytes = kSplits * kSlotBytes;
    static_assert(kRows % 64 == 0 && kConsumers <= 3 && kCols % 32 == 0 && 16 % kSplits == 0 && kSplits <= 8);
    static_assert(kStages >= 4 && kWarps * kExchangeBytes <= kBarriers && kSharedBytes <= kMostShared);
};

// What a warp sends and receives. Groups of 8 columns of a row are dealt out to the lanes as items:
// item i of lane l is number 32·i + l, counted over the columns of 32 in fours, the rows of the share
// and the blocks of 32 columns.
template <class Tile>
class Exchange {
public:
    static constexpr int kBlocks = Tile::kCols / 32;
    static constexpr int kItems = (kBlocks * Tile::kShare * 4 + 31) / 32;

    __device__ __forceinline__ Exchange(uint8_t* shared, int warp, int rank)
        : memory(shared + warp * Tile::kExchangeBytes),
          barrier(shared_address(shared) + Tile::kWarpBarriers + 8 * warp),
          drained(shared_address(shared) + Tile::kDrained),
          rank(rank) {}

    // Before `drain`, by a warp that will wait.
    __device__ __forceinline__ void expect() const {
        if (Tile::kSplits > 1 && threadIdx.x % 32 == 0) barrier_expect(barrier, Tile::kExchangeBytes);
    }

    // Returns when no consumer of the cluster needs its ring any more; every warp of theirs calls it.
    __device__ __forceinline__ void drain() const {
        if constexpr (Tile::kSplits == 1) {
            named_barrier_sync(1, 128 * Tile::kConsumers);
        } else {
            // The barriers of all blocks are there.
            cluster_wait();
            if (threadIdx.x % 32 < Tile::kSplits) barrier_arrive_at(drained, threadIdx.x % 32);
            barrier_wait(drained, 0);
        }
    }

    // Gives each row to the block that finishes it.
    __device__ __forceinline__ void send(const float (&d)[Tile::kCols / 2]) const {
        const int upper = threadIdx.x % 32 / 4;
        send_rows<0>(d, upper);
        send_rows<2>(d, upper + 8);
    }

    __device__ __forceinline__ void wait() const {
        if constexpr (Tile::kSplits == 1) {
            __syncwarp();
        } else {
            barrier_wait_cluster(barrier, 0);
        }
    }

    // Where an item lies in the tile's columns and in the 16 rows; the last ones may lie beyond.
    __device__ __forceinline__ static int item_column(int item) {
        return block(item) * 32 + threadIdx.x % 4 * 8;
    }
    __device__ __forceinline__ int item_row(int item) const { return rank * Tile::kShare + share_row(item); }

    // The sums of an item; all lanes of the warp call it.
    __device__ __forceinline__ void sum(float (&v)[8], int item) const {
        const int run = 2 * min(block(item), kBlocks - 1);
        const uint8_t* from = memory + (run * Tile::kShare + share_row(item)) * 64 + threadIdx.x % 4 * 16;
#pragma unroll
        for (int sender = 0; sender < Tile::kSplits; ++sender) {
            const float4 low = *reinterpret_cast<const float4*>(from);
            const float4 high = *reinterpret_cast<const float4*>(from + Tile::kShare * 64);
            const float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = sender == 0 ? part[i] : v[i] + part[i];
            from += Tile::kSlotBytes;
        }
        transpose_quad(v);
    }

private:
    __device__ __forceinline__ static int index(int item) { return item * 32 + threadIdx.x % 32; }
    __device__ __forceinline__ static int share_row(int item) { return index(item) / 4 % Tile::kShare; }
    __device__ __forceinline__ static int block(int item) { return index(item) / (4 * Tile::kShare); }

    // kHalf 0: the rows that d[4j], d[4j + 1] hold; 2: those eight rows below, `row` of the 16.
    template <int kHalf>
    __device__ __forceinline__ void send_rows(const float (&d)[Tile::kCols / 2], int row) const {
        const int offset = rank * Tile::kSlotBytes + row % Tile::kShare * 64 + threadIdx.x % 4 * 16;
        if constexpr (Tile::kSplits == 1) {
#pragma unroll
            for (int run = 0; run < Tile::kCols / 16; ++run) {
                const float* from = d + 8 * run + kHalf;
                *reinterpret_cast<float4*>(memory + offset + run * Tile::kShare * 64) =
                    make_float4(from[0], from[1], from[4], from[5]);
            }
        } else {
            const int receiver = row / Tile::kShare;
            const uint32_t to = address_at(shared_address(memory) + offset, receiver);
            const uint32_t counted = address_at(barrier, receiver);
#pragma unroll
            for (int run = 0; run < Tile::kCols / 16; ++run) {
                const float* from = d + 8 * run + kHalf;
                store_async(to + run * Tile::kShare * 64, counted, from[0], from[1], from[4], from[5]);
            }
        }
    }

    uint8_t* const memory;
    const uint32_t barrier;
    const uint32_t drained;
    const int rank;
};

// The whole kernel: kThreads threads, kSharedBytes of dynamic shared memory, a cluster of kSplits
// blocks for each tile.
template <class Tile, class Problem>
__device__ __forceinline__ void multiply_split_tile(const Problem& problem) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = shared_address(shared);
    const int warp = warp_uniform(threadIdx.x / 32);
    const int rank = blockIdx.x % Tile::kSplits;
    const typename Problem::Place place = problem.place(blockIdx.x / Tile::kSplits, rank);
    Ring<Tile> ring{base};
    if (threadIdx.x == 0) {
        for (Ring<Tile> each = ring; each.parity == 0; each.advance()) {
            barrier_init(each.full(), 1);
            barrier_init(each.empty(), Tile::kWarps);
        }
        for (int i = 0; i < Tile::kWarps; ++i) barrier_init(base + Tile::kWarpBarriers + 8 * i, 1);
        barrier_init(base + Tile::kDrained, Tile::kSplits * Tile::kWarps);
        barrier_init_fence();
    }
    // The other blocks are waited for only when there is something to tell them.
    if constexpr (Tile::kSplits > 1) {
        __syncwarp();
        cluster_arrive_relaxed();
    }
    __syncthreads();
    if (warp >= Tile::kWarps) {
        if constexpr (Tile::kConsumers > 1) lower_registers<Tile::kProducerRegisters>();
        if (warp == Tile::kWarps && elect_one()) fill_ring(problem, ring, place, rank);
        __syncwarp();
        if constexpr (Tile::kSplits > 1) cluster_wait();
        return;
    }
    if constexpr (Tile::kConsumers > 1) raise_registers<Tile::kConsumerRegisters>();
    const Exchange<Tile> exchange(shared, warp, rank);
    const bool inside = problem.has_row(place, warp * 16);
    if (inside) exchange.expect();
    float d[1][Tile::kCols / 2];
    // The stages that are left need not be handed back.
    multiply_steps<Tile>(ring, problem.steps(place), warp / 4 * 64, d, [](int) {});
    wgmma_wait<0>();
    wgmma_pin(d[0]);
    exchange.drain();
    if (!inside) return;
    exchange.send(d[0]);
    problem.finish(place, warp * 16, exchange);
}
