// Attention with heads of 64 values over ranges of keys, for Hopper's wgmma and bulk tensor copies.
//
//   out[i, h] = Σ_j softmax_j(scale · q[i, h]·k[j, h]) · v[j, h]
//
// q, k, v and out are matrices of packed rows, head h the columns 64h to 64h + 63; bases are 16-byte
// aligned, row strides multiples of 8 elements. A tile is kGroups groups of up to 64 consecutive rows
// of q and out together with a list of ranges of rows of k and v. A range starts a new tile of keys, so
// only the last one of each range is masked. Each group sees a number of key tiles from the first on,
// whole ranges: short frames that follow each other, of which each sees what the one before sees and
// more, share a tile. Row numbers and tile_count · heads fit in int.
//
// Precision: bf16 in and out; scores, softmax and sums in f32; the unnormalised probabilities are
// rounded to bf16 for the product with v, their row sum is taken before that rounding.
// scale > 0. A NaN in a query, or in a key or value it sees, makes its output NaN; rows outside of
// its ranges have no influence, whatever they hold. Tiles without any key are skipped.
//
// Host: tensor maps of q, k, v are two-dimensional (columns, rows), 128-byte swizzle, zeros outside,
// boxes of 64 columns by 64 rows (q) or kKeys rows (k and v). Launch: kThreads threads,
// kSharedBytes of dynamic shared memory, any number G of blocks in x. Block b takes the work items b,
// b + G, b + 2G, …, item i being head i % heads of tile i / heads: with G = the number of
// multiprocessors the loads of an item overlap the end of the one before, and with the tiles of most
// keys first every block gets about as much to do.
//
// Three warpgroups of 64 queries each compute, one warp of a fourth loads. At this head size the
// special function unit needs as long for the exponentials as the tensor cores for both products, so
// the loop is arranged to keep both busy: a warpgroup issues the scores of the next key tile and the
// value product of the current one together and takes the softmax of the former while the latter
// runs, and the warpgroups pass a turn around, so that one issues products while the others are in
// their softmax. Only the loading warp knows the work: it hands items and key counts to the others
// along with the data, in shared memory.
#include "lib/attention.cuh"
#include "lib/hopper.cuh"
#include "lib/launch.cuh"
#include "lib/wgmma.cuh"

namespace {

constexpr int kHead = 64;
constexpr int kRowBytes = kHead * sizeof(bf16);
constexpr int kGroups = 3;
constexpr int kQueries = 64 * kGroups;
constexpr int kKeys = 128;
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kStages = 5;
constexpr int kComputingWarps = 4 * kGroups;

// 65536 registers between four warpgroups.
constexpr int kComputingRegisters = 160;
constexpr int kLoadingRegisters = 32;
static_assert(128 * (kGroups * kComputingRegisters + kLoadingRegisters) <= 65536, "of one block");

// The running maximum may lag behind by this much (in powers of two) before sums are rescaled.
constexpr float kLag = 8.0f;

struct AttentionSm90Tile {
    // Of each group the first row, how many rows, and the key tiles that it sees; all 0 without rows.
    int query[kGroups];
    int queries[kGroups];
    int key_tiles[kGroups];
    int first_range;
    int ranges;
    int pad;
};
static_assert(sizeof(AttentionSm90Tile) == 48, "as on the host");

struct AttentionSm90Params {
    TensorMap q, k, v;
    bf16* out;
    const AttentionSm90Tile* tiles;
    const KeyRange* ranges;
    int64_t ldo;
    float scale;
    int heads;
    int tile_count;
    int pad;
};
static_assert(sizeof(AttentionSm90Params) == 448, "as on the host");

struct Work {
    int query[kGroups], queries[kGroups], key_tiles[kGroups];
    int head;
    int all_key_tiles;  // 0: no work is left
};

// Shared memory. The tiles come first: their swizzle pattern repeats every 1024 bytes.
struct Shared {
    uint8_t q[2][kQueries * kRowBytes];
    uint8_t k[kStages][kKeys * kRowBytes];
    uint8_t v[kStages][kKeys * kRowBytes];
    uint64_t q_full[2], q_empty[2];
    uint64_t k_full[kStages], k_empty[kStages];
    uint64_t v_full[kStages], v_empty[kStages];
    Work work[2];
    int keys[kStages];  // of the key tile in this stage, those that are seen
};
constexpr int kTileBytes = kKeys * kRowBytes;
constexpr int kGroupBytes = 64 * kRowBytes;
constexpr int kSharedBytes = sizeof(Shared) + 1024;  // its start is aligned by hand
static_assert(kSharedBytes == 214320, "as on the host; a block may have 232448");

// A stage of the ring and the parity its barriers are waited for with.
struct Stage {
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++index == kStages) {
            index = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ uint32_t barrier_of(const uint64_t* barriers, int index) {
    return shared_address(barriers) + 8 * index;
}

// ---- the loading warp ------------------------------------------------------------------------------

// One thread.
__device__ __forceinline__ void load_work(const AttentionSm90Params& p, Shared& shared) {
    Stage stage;
    int buffer = 0;
    uint32_t buffer_parity = 1;
    const int items = p.tile_count * p.heads;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int rank = item / p.heads;
        const int head = item - rank * p.heads;
        const AttentionSm90Tile& tile = p.tiles[rank];
        const KeyRange* ranges = p.ranges + tile.first_range;
        int key_tiles = 0;
        for (int r = 0; r < tile.ranges; ++r) key_tiles += (ranges[r].count + kKeys - 1) / kKeys;
        if (key_tiles == 0) continue;

        barrier_wait(barrier_of(shared.q_empty, buffer), buffer_parity);
        Work& work = shared.work[buffer];
        int groups = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            work.query[g] = tile.query[g];
            work.queries[g] = tile.queries[g];
            work.key_tiles[g] = tile.key_tiles[g];
            groups += tile.queries[g] > 0;
        }
        work.head = head;
        work.all_key_tiles = key_tiles;
        const uint32_t q_full = barrier_of(shared.q_full, buffer);
        barrier_expect(q_full, groups * kGroupBytes);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            if (tile.queries[g] == 0) continue;
            copy_box_2d(shared_address(shared.q[buffer]) + g * kGroupBytes, &p.q, q_full, head * kHead,
                        tile.query[g]);
        }
        buffer ^= 1;
        buffer_parity ^= buffer == 0;

        for (int r = 0; r < tile.ranges; ++r) {
            const KeyRange range = ranges[r];
            for (int first = 0; first < range.count; first += kKeys) {
                const int row = range.start + first;
                const uint32_t k_full = barrier_of(shared.k_full, stage.index);
                const uint32_t v_full = barrier_of(shared.v_full, stage.index);
                barrier_wait(barrier_of(shared.k_empty, stage.index), stage.parity ^ 1);
                shared.keys[stage.index] = min(range.count - first, kKeys);
                barrier_expect(k_full, kTileBytes);
                copy_box_2d(shared_address(shared.k[stage.index]), &p.k, k_full, head * kHead, row);
                barrier_wait(barrier_of(shared.v_empty, stage.index), stage.parity ^ 1);
                barrier_expect(v_full, kTileBytes);
                copy_box_2d(shared_address(shared.v[stage.index]), &p.v, v_full, head * kHead, row);
                stage.advance();
            }
        }
    }
    barrier_wait(barrier_of(shared.q_empty, buffer), buffer_parity);
    shared.work[buffer].all_key_tiles = 0;
    barrier_arrive(barrier_of(shared.q_full, buffer));
}

// ---- the computing warpgroups ----------------------------------------------------------------------

// Turns: barrier 1 + g is passed by warpgroup g once the one before it has arrived.
__device__ __forceinline__ void await_turn(int group) { named_barrier_sync(1 + group, 256); }
__device__ __forceinline__ void pass_turn(int group) {
    named_barrier_arrive(group == kGroups - 1 ? 1 : 2 + group, 256);
}

// The warp is done with what the barrier guards.
__device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// scores[64 queries, kKeys] of the warpgroup: issued, not waited for.
__device__ __forceinline__ void issue_scores(float (&s)[kKeys / 2], uint64_t q, uint32_t k_tile) {
    const uint64_t k = descriptor::k_major(k_tile);
#pragma unroll
    for (int i = 0; i < kHead / 16; ++i) {
        Wgmma<kKeys>::ss<false>(s, descriptor::advance(q, 32 * i), descriptor::advance(k, 32 * i), i > 0);
    }
    wgmma_commit();
}

// o += probabilities · values: issued, not waited for.
__device__ __forceinline__ void issue_values(float (&o)[kHead / 2], const uint32_t (&p)[kKeys / 4],
                                             uint32_t v_tile) {
    const uint64_t v = descriptor::mn_major(v_tile, kTileBytes);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
        Wgmma<kHead>::rs<true>(o, p + 4 * i, descriptor::advance(v, 16 * kRowBytes * i), true);
    }
    wgmma_commit();
}

// The softmax of two rows per thread, l/4 and l/4 + 8 of the warp's 16, over the key tiles so far.
struct Softmax {
    float scale;         // of the scores, times log2(e)
    float reference[2];  // of the exponentials: the largest score up to kLag
    float sum[2];        // of this thread's columns only
    float shrink[2];     // what sums made with the previous reference are to be multiplied by

    __device__ __forceinline__ void start(float scale_log2) {
        scale = scale_log2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Finite, so that a tile of scores -inf gives zeros rather than NaN.
            reference[r] = -1e30f;
            sum[r] = 0.0f;
        }
    }

    // Scores to unnormalised probabilities. True when the warp has to apply `shrink` to its output.
    __device__ __forceinline__ bool apply(float (&s)[kKeys / 2]) {
        float largest[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // fmaxf passes over NaN, which reaches the output through its exponential.
            float even = reference[r], odd = reference[r];
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
                even = fmaxf(even, s[4 * j + 2 * r]);
                odd = fmaxf(odd, s[4 * j + 2 * r + 1]);
            }
            largest[r] = quad_max(fmaxf(even, odd));
        }
        const bool lags = (largest[0] - reference[0]) * scale > kLag ||
                          (largest[1] - reference[1]) * scale > kLag;
        const bool moved = __any_sync(0xffffffffu, lags);
        if (moved) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                shrink[r] = exp2_approximate((reference[r] - largest[r]) * scale);
                sum[r] *= shrink[r];
                reference[r] = largest[r];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float offset = -reference[r] * scale;
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
                float& a = s[4 * j + 2 * r];
                float& b = s[4 * j + 2 * r + 1];
                a = exp2_approximate(fmaf(a, scale, offset));
                b = exp2_approximate(fmaf(b, scale, offset));
                even += a;
                odd += b;
            }
            sum[r] += even + odd;
        }
        return moved;
    }
};

__device__ __forceinline__ void store_shared_zeros(uint32_t to) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// A key tile of which only the first `keys` are seen: their scores alone stay, and the rows of the
// values behind them become zeros, for 0 · NaN is NaN. Every warpgroup clears the rows for itself
// rather than wait for another; one that reads them meanwhile has cleared them before.
__device__ __forceinline__ void hide_unseen(float (&s)[kKeys / 2], int keys, uint32_t v_full,
                                            uint32_t parity, uint32_t v_tile, int group) {
    const int thread = threadIdx.x % 128;
    const int seen = keys - 2 * (thread % 4);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
        if (8 * (i / 4) + i % 2 >= seen) s[i] = negative_infinity();
    }
    barrier_wait(v_full, parity);
    for (int chunk = keys * (kRowBytes / 16) + thread; chunk < kTileBytes / 16; chunk += 128) {
        store_shared_zeros(v_tile + 16 * chunk);
    }
    fence_async_proxy();
    named_barrier_sync(1 + kGroups + group, 128);
}

__device__ __forceinline__ void pack_probabilities(uint32_t (&p)[kKeys / 4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// Transposes 4 words × 4 threads of a quad: word k of thread t becomes word t of thread k.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
        (upper ? w[i] : w[i + 2]) = other;
    }
}

// What one warpgroup answers; the loading warp may write down new work meanwhile.
struct Share {
    int query, queries, head, key_tiles;
};

// A quad holds two adjacent columns per thread of each 8; exchanged, each thread has 8 to itself and
// the stores are 16 bytes wide.
__device__ __forceinline__ void store_output(const AttentionSm90Params& p, const Share& share,
                                             const float (&o)[kHead / 2], const float (&sum)[2]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float inverse = 1.0f / quad_sum(sum[r]);
        const int row = 16 * warp + lane / 4 + 8 * r;
        bf16* out = p.out + (static_cast<int64_t>(share.query) + row) * p.ldo + share.head * kHead;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int at = 16 * half + 4 * j + 2 * r;
                words[j] = pack_bf16(o[at] * inverse, o[at + 1] * inverse);
            }
            transpose_quad(words);
            if (row < share.queries) {
                *reinterpret_cast<uint4*>(out + 32 * half + 8 * (lane % 4)) =
                    make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

// From key tile `first` on a warpgroup has no queries that see them: it only keeps the ring and the
// turns going.
__device__ __forceinline__ void pass_over(Shared& shared, int first, int key_tiles, Stage& stage, int group) {
    for (int t = first; t < key_tiles; ++t) {
        barrier_wait(barrier_of(shared.k_full, stage.index), stage.parity);
        release(barrier_of(shared.k_empty, stage.index));
        if (t > 0) {
            await_turn(group);
            pass_turn(group);
        }
        barrier_wait(barrier_of(shared.v_full, stage.index), stage.parity);
        release(barrier_of(shared.v_empty, stage.index));
        stage.advance();
    }
}

__device__ __forceinline__ void attend(const AttentionSm90Params& p, Shared& shared, const Share& share,
                                       Stage& stage, uint32_t q_tile, uint32_t q_empty, int group) {
    const uint64_t q = descriptor::k_major(q_tile);
    const uint32_t k_tiles = shared_address(shared.k[0]);
    const uint32_t v_tiles = shared_address(shared.v[0]);
    float s[kKeys / 2];
    float o[kHead / 2];
    uint32_t probabilities[kKeys / 4];
    Softmax softmax;
    softmax.start(p.scale * kLog2E);
#pragma unroll
    for (int i = 0; i < kHead / 2; ++i) o[i] = 0.0f;

    barrier_wait(barrier_of(shared.k_full, stage.index), stage.parity);
    int keys = warp_uniform(shared.keys[stage.index]);
    wgmma_fence();
    issue_scores(s, q, k_tiles + kTileBytes * stage.index);
    wgmma_wait<0>();
    wgmma_pin(s);
    release(barrier_of(shared.k_empty, stage.index));
    if (keys < kKeys) {
        hide_unseen(s, keys, barrier_of(shared.v_full, stage.index), stage.parity,
                    v_tiles + kTileBytes * stage.index, group);
    }
    softmax.apply(s);
    pack_probabilities(probabilities, s);
    barrier_wait(barrier_of(shared.v_full, stage.index), stage.parity);

    for (int t = 1; t < share.key_tiles; ++t) {
        const Stage previous = stage;
        stage.advance();
        barrier_wait(barrier_of(shared.k_full, stage.index), stage.parity);
        keys = warp_uniform(shared.keys[stage.index]);
        await_turn(group);
        wgmma_pin(o);
        wgmma_pin(probabilities);
        wgmma_fence();
        issue_scores(s, q, k_tiles + kTileBytes * stage.index);
        issue_values(o, probabilities, v_tiles + kTileBytes * previous.index);
        pass_turn(group);

        wgmma_wait<1>();
        wgmma_pin(s);
        release(barrier_of(shared.k_empty, stage.index));
        if (keys < kKeys) {
            hide_unseen(s, keys, barrier_of(shared.v_full, stage.index), stage.parity,
                        v_tiles + kTileBytes * stage.index, group);
        }
        const bool moved = softmax.apply(s);

        // These values are for the next product. The loop that waits for them also keeps the
        // assembler from moving the wait for the current product in front of the exponentials.
        wgmma_pin(s);
        barrier_wait(barrier_of(shared.v_full, stage.index), stage.parity);
        wgmma_wait<0>();
        wgmma_pin(o);
        release(barrier_of(shared.v_empty, previous.index));
        if (moved) {
#pragma unroll
            for (int i = 0; i < kHead / 2; ++i) o[i] *= softmax.shrink[i / 2 % 2];
        }
        pack_probabilities(probabilities, s);
    }

    release(q_empty);
    wgmma_pin(o);
    wgmma_pin(probabilities);
    wgmma_fence();
    issue_values(o, probabilities, v_tiles + kTileBytes * stage.index);
    wgmma_wait<0>();
    wgmma_pin(o);
    release(barrier_of(shared.v_empty, stage.index));
    stage.advance();
    store_output(p, share, o, softmax.sum);
}

__device__ __forceinline__ void compute(const AttentionSm90Params& p, Shared& shared, int group) {
    Stage stage;
    int buffer = 0;
    uint32_t buffer_parity = 0;
    if (group == kGroups - 1) pass_turn(group);
    while (true) {
        barrier_wait(barrier_of(shared.q_full, buffer), buffer_parity);
        const Work& work = shared.work[buffer];
        const int all_key_tiles = warp_uniform(work.all_key_tiles);
        if (all_key_tiles == 0) break;
        const Share share = {warp_uniform(work.query[group]), warp_uniform(work.queries[group]), work.head,
                             warp_uniform(work.key_tiles[group])};
        const uint32_t q_empty = barrier_of(shared.q_empty, buffer);
        if (share.key_tiles > 0) {
            const uint32_t q_tile = shared_address(shared.q[buffer]) + kGroupBytes * group;
            attend(p, shared, share, stage, q_tile, q_empty, group);
        } else {
            __syncwarp();
            release(q_empty);
        }
        pass_over(shared, share.key_tiles, all_key_tiles, stage, group);
        buffer ^= 1;
        buffer_parity ^= buffer == 0;
    }
    // The last turn that was passed: no barrier is left half-way.
    if (group == 0) await_turn(group);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_sm90_64(const __grid_constant__ AttentionSm90Params p) {
    extern __shared__ uint8_t dynamic_shared[];
    const uint32_t misaligned = shared_address(dynamic_shared) % 1024;
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared + (1024 - misaligned) % 1024);

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            barrier_init(barrier_of(shared.q_full, i), 1);
            barrier_init(barrier_of(shared.q_empty, i), kComputingWarps);
        }
        for (int i = 0; i < kStages; ++i) {
            barrier_init(barrier_of(shared.k_full, i), 1);
            barrier_init(barrier_of(shared.k_empty, i), kComputingWarps);
            barrier_init(barrier_of(shared.v_full, i), 1);
            barrier_init(barrier_of(shared.v_empty, i), kComputingWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    after_predecessor();

    const int group = warp_uniform(threadIdx.x / 128);
    if (group == kGroups) {
        lower_registers<kLoadingRegisters>();
        if (warp_uniform(threadIdx.x / 32) == 4 * kGroups && elect_one()) {
            prefetch_tensor_map(&p.q);
            prefetch_tensor_map(&p.k);
            prefetch_tensor_map(&p.v);
            load_work(p, shared);
        }
    } else {
        raise_registers<kComputingRegisters>();
        compute(p, shared, group);
    }
}
