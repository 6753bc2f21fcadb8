// Attention over ranges of packed rows, head sizes 64 and 16.
//
//   out[i] = Σ_j softmax_j(scale·q[i]·k[j] + bias[key position − query position])·v[j]
//
// q and out [rows, heads·size], k and v [rows, heads·size], row strides apart; head h has the
// columns h·size .. (h + 1)·size. A tile of queries sees the keys of its ranges; positions of
// keys count through these ranges. With `causal` a query sees only the keys up to its own
// position. The bias, f32 [heads, bias_span], covers every relative position of the segment.
//
// Precision: bf16 in; scores, maxima, exponentials and sums in f32; the weights are rounded to
// bf16 for the product with v, their sum is that of the unrounded ones; bf16 out. NaN in a row
// that a query sees makes the query's output NaN: the maximum passes over NaN, but the weight
// and with it the sum is NaN. Rows outside the ranges are never read. A row of v hidden by the
// causal mask has weight 0, so its NaN spreads, as in the product it stands for.
//
// Limits: pointers aligned to 16 bytes, strides multiples of 8, scale > 0, at least one key.
// Launch: grid (tiles, heads), 128 threads, no dynamic shared memory. Queries per tile:
// attention_64 128; attention_64_masked and attention_16_masked 64.
//
// Design: a warp owns 16 or 32 queries for the whole walk over the keys. Its scores leave the
// tensor cores in the layout in which the second product wants its left operand, so weights
// never go through memory, and 32 queries use every fragment of k and v twice. Tiles of 64 keys
// are copied asynchronously, one ahead; q passes through the buffer of the second tile on its
// way to registers. Rows in shared memory are swizzled so that the eight rows of a matrix load
// lie in different banks. Two blocks fit in a multiprocessor, one computing exponentials while
// the other multiplies. Masks cost only the last tile of a range.

#include "lib/attention.cuh"
#include "lib/launch.cuh"
#include "lib/mma.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kKeys = 64;

// Rows of kSize elements in shared memory, in chunks of 16 bytes.
template <int kSize>
struct Rows {
    static constexpr int kBytes = kSize * 2;
    static constexpr int kChunks = kSize / 8;
    static_assert(kChunks == 8 || kChunks == 2, "other sizes want another swizzle");

    // Where a chunk lies. Any eight consecutive rows starting at a multiple of eight have a
    // given chunk in eight different groups of banks.
    static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
        const int turn = row / (8 / kChunks) % kChunks;
        return row * kBytes + (chunk ^ turn) * 16;
    }

    // Starts copying rows `from .. from + count`, zeros for the rest of kCount.
    template <int kCount>
    static __device__ __forceinline__ void copy(uint32_t to, const bf16* from, int64_t ld,
                                                int count) {
        constexpr int kStep = kThreads / kChunks;
        const int chunk = threadIdx.x % kChunks;
        const int first = threadIdx.x / kChunks;
#pragma unroll
        for (int i = 0; i < kCount / kStep; ++i) {
            const int row = first + i * kStep;
            const bool valid = row < count;
            copy_async_16(to + offset(row, chunk), from + (valid ? row : 0) * ld + chunk * 8,
                          valid);
        }
    }
};

// Hides the keys that a partial tile lacks.
template <int kRowTiles>
__device__ __forceinline__ void hide_missing(float (&scores)[kRowTiles][kKeys / 8][4], int count) {
    const int first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (n * 8 + first + e % 2 < count) continue;
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) scores[r][n][e] = negative_infinity();
        }
    }
}

// Turns the scores of a row (half 0 or 1 of the accumulators) into base-2 exponents, adds the
// bias (its middle element given) and hides the keys that are missing or come after the query.
__device__ __forceinline__ void mask_row(const AttentionParams& p, const float* bias,
                                         float (&scores)[kKeys / 8][4], int half,
                                         const KeyTile& keys, int query_position) {
    const int first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = n * 8 + first + i;
            const int relative = keys.position + key - query_position;
            float& score = scores[n][2 * half + i];
            score *= p.scale * kLog2E;
            if (key >= keys.count || (p.causal && relative > 0)) {
                score = negative_infinity();
            } else if (bias != nullptr) {
                score = fmaf(bias[relative], kLog2E, score);
            }
        }
    }
}

// Divides the sums of sixteen rows, `first` on, by their total weights and stores them.
template <int kSize>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const AttentionTile& tile,
                                           int first, const float (&sums)[kSize / 8][4],
                                           const float (&total)[2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float inverse = 1.0f / quad_sum(total[half]);
        const int row = first + half * 8 + lane / 4;
        if (row >= tile.queries) continue;
        bf16* out = p.out + (tile.query + row) * p.ldo + blockIdx.y * kSize + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kSize / 8; ++n) {
            *reinterpret_cast<uint32_t*>(out + n * 8) =
                pack_bf16(sums[n][2 * half] * inverse, sums[n][2 * half + 1] * inverse);
        }
    }
}

// kRowTiles: sixteens of queries per warp.
template <int kSize, int kRowTiles, bool kMasked>
__device__ __forceinline__ void attend(const AttentionParams& p) {
    using Row = Rows<kSize>;
    constexpr int kQueries = kWarps * kRowTiles * 16;
    constexpr int kTileBytes = kKeys * Row::kBytes;
    constexpr int kStageBytes = 2 * kTileBytes;  // k, then v
    static_assert(kQueries * Row::kBytes <= kStageBytes, "q passes through one stage");
    __shared__ alignas(128) unsigned char memory[2 * kStageBytes];
    const uint32_t stages = shared_address(memory);

    const AttentionTile tile = p.tiles[blockIdx.x];
    const int head = blockIdx.y;
    const int lane = threadIdx.x % 32;
    const int first_query = threadIdx.x / 32 * kRowTiles * 16;  // of the warp, in the tile
    const bf16* k = p.k + head * kSize;
    const bf16* v = p.v + head * kSize;
    // Keys after the last query are hidden from all.
    const int limit =
        kMasked && p.causal ? min(tile.keys, tile.position + tile.queries) : tile.keys;
    KeyTiles<kKeys> key_tiles(p.ranges + tile.first_range, tile.ranges, limit);
    const auto copy_keys = [&](const KeyTile& keys, uint32_t to) {
        if (keys.count > 0) {
            Row::template copy<kKeys>(to, k + keys.row * p.ldk, p.ldk, keys.count);
            Row::template copy<kKeys>(to + kTileBytes, v + keys.row * p.ldv, p.ldv, keys.count);
        }
        commit_copies();
    };

    const bf16* q_rows = p.q + tile.query * p.ldq + head * kSize;
    Row::template copy<kQueries>(stages + kStageBytes, q_rows, p.ldq, tile.queries);
    commit_copies();
    KeyTile keys = key_tiles.next();
    copy_keys(keys, stages);

    // Addresses of matrix loads: q takes rows, then columns from its four matrices, as v does
    // (whose rows are the inner dimension, hence transposed); k columns, then rows.
    const int matrix = lane / 8;
    const uint32_t rows_first = Row::offset(lane % 8 + matrix % 2 * 8, matrix / 2);
    const uint32_t columns_first = Row::offset(lane % 8 + matrix / 2 * 8, matrix % 2);

    uint32_t q[kRowTiles][kSize / 16][4];
    wait_for_copies<1>();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
        const uint32_t from = stages + kStageBytes + (first_query + r * 16) * Row::kBytes;
#pragma unroll
        for (int d = 0; d < kSize / 16; ++d) load_matrices(q[r][d], (from + rows_first) ^ d * 32);
    }

    // Of the rows lane / 4 and lane / 4 + 8 of each sixteen.
    float sums[kRowTiles][kSize / 8][4] = {};
    float max[kRowTiles][2];
    float total[kRowTiles][2] = {};  // of the lane's own columns
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) max[r][0] = max[r][1] = negative_infinity();
    const float scale = kMasked ? 1.0f : p.scale * kLog2E;
    const float* bias = nullptr;
    if (kMasked && p.bias != nullptr) {
        bias = p.bias + int64_t{head} * p.bias_span + (p.bias_span - 1) / 2;
    }

    for (int stage = 0; keys.count > 0; stage ^= 1) {
        wait_for_copies<0>();
        // Also: every warp is done with what the next copies overwrite.
        __syncthreads();
        const KeyTile next = key_tiles.next();
        copy_keys(next, stages + (stage ^ 1) * kStageBytes);

        float scores[kRowTiles][kKeys / 8][4] = {};
        const uint32_t k_tile = stages + stage * kStageBytes;
#pragma unroll
        for (int d = 0; d < kSize / 16; ++d) {
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                uint32_t b[4];
                load_matrices(b, ((k_tile + columns_first) ^ d * 32) + n * 16 * Row::kBytes);
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    multiply_accumulate(scores[r][2 * n], q[r][d], b[0], b[1]);
                    multiply_accumulate(scores[r][2 * n + 1], q[r][d], b[2], b[3]);
                }
            }
        }

        if constexpr (kMasked) {
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // Rows past the tile's queries are computed but not stored; they take the
                    // last query's place, for which there is a bias.
                    const int row = min(first_query + r * 16 + half * 8 + lane / 4,
                                        tile.queries - 1);
                    mask_row(p, bias, scores[r], half, keys, tile.position + row);
                }
            }
        } else if (keys.count < kKeys) {
            hide_missing(scores, keys.count);
        }

        float base[kRowTiles][2];
        float shrink[kRowTiles][2];
        bool rose = false;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = max[r][half];
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    highest = fmaxf(highest, scores[r][n][2 * half]);
                    highest = fmaxf(highest, scores[r][n][2 * half + 1]);
                }
                highest = quad_max(highest);
                base[r][half] = softmax_base(highest, scale);
                shrink[r][half] = softmax_shrink(max[r][half], scale, base[r][half]);
                rose |= highest > max[r][half];
                max[r][half] = highest;
            }
        }
        // Maxima rarely rise after the first tiles.
        if (__any_sync(0xffffffff, rose)) {
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
                total[r][0] *= shrink[r][0];
                total[r][1] *= shrink[r][1];
#pragma unroll
                for (int n = 0; n < kSize / 8; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[r][n][e] *= shrink[r][e / 2];
                }
            }
        }

        const uint32_t v_tile = k_tile + kTileBytes;
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
            uint32_t weights[kRowTiles][4];
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // Register i: row half i % 2 of the columns' half i / 2.
                    const float* pair = &scores[r][2 * n + i / 2][i % 2 * 2];
                    const float low = exp2_approximate(fmaf(pair[0], scale, -base[r][i % 2]));
                    const float high = exp2_approximate(fmaf(pair[1], scale, -base[r][i % 2]));
                    total[r][i % 2] += low + high;
                    weights[r][i] = pack_bf16(low, high);
                }
            }
#pragma unroll
            for (int d = 0; d < kSize / 16; ++d) {
                uint32_t b[4];
                load_matrices_transposed(
                    b, ((v_tile + rows_first) ^ d * 32) + n * 16 * Row::kBytes);
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    multiply_accumulate(sums[r][2 * d], weights[r], b[0], b[1]);
                    multiply_accumulate(sums[r][2 * d + 1], weights[r], b[2], b[3]);
                }
            }
        }
        keys = next;
    }

#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
        store_rows<kSize>(p, tile, first_query + r * 16, sums[r], total[r]);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention_64(const __grid_constant__ AttentionParams p) {
    after_predecessor();
    attend<64, 2, false>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention_64_masked(const __grid_constant__ AttentionParams p) {
    after_predecessor();
    attend<64, 1, true>(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    attention_16_masked(const __grid_constant__ AttentionParams p) {
    after_predecessor();
    attend<16, 1, true>(p);
}
