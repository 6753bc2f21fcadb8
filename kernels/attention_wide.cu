// Attention over ranges of packed rows for large heads: any size up to 512, a multiple of 8.
//
//   out[i] = Σ_j softmax_j(scale·q[i]·k[j])·v[j]
//
// Layouts, ranges, precision and NaN as in attention.cu; no bias, no causal mask.
//
// Limits: pointers aligned to 16 bytes, strides multiples of 8, scale > 0, at least one key.
// Launch: grid (tiles, heads), 256 threads, 64 queries per tile, dynamic shared memory
// 33536 + 8192·⌈size / 64⌉ bytes: 99072 for size 512, which every device since sm_80 grants.
//
// Design: 64 queries by 512 columns of f32 sums fill the registers of eight warps, so there is
// no room for a warp to own queries. Instead the sums are split over the warps by columns, the
// 64×64 scores of a tile of keys by queries and keys, and the weights change hands in shared
// memory, as do the maxima of the two warps that share queries. q stays in shared memory; k and
// v pass through it in pieces of 8 KB, k 64 keys by 64 columns, v 16 keys by 256 columns of
// which each warp has 32, so that a piece keeps all warps busy. Three pieces are in flight.
// Columns beyond the head size are zeros: one kernel serves all sizes, and is efficient from
// 256 on.

#include "lib/attention.cuh"
#include "lib/launch.cuh"
#include "lib/mma.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kQueries = 64;
constexpr int kKeys = 64;
constexpr int kMostColumns = 512;
constexpr int kColumns = 256;               // of v in a piece
constexpr int kWarpColumns = kColumns / 8;  // of these a warp's
constexpr int kPieces = 3;
constexpr int kPieceBytes = 8192;
constexpr int kWeightBytes = kQueries * kKeys * 2;

// Where chunk `chunk` of 16 bytes of row `row` lies in a matrix with `kRowBytes` to a row. Eight
// consecutive rows from a multiple of eight have a chunk in eight different groups of banks.
template <int kRowBytes>
__device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ row % 8) * 16;
}

// Starts copying the piece kRows × kChunks·8 of which `rows` rows and `columns` columns exist.
template <int kRows, int kChunks>
__device__ __forceinline__ void copy_piece(uint32_t to, const bf16* from, int64_t ld, int rows,
                                           int columns) {
    static_assert(kRows * kChunks * 16 == kPieceBytes, "pieces are of one size");
    const int chunk = threadIdx.x % kChunks;
    const bool wanted = chunk * 8 < columns;
#pragma unroll
    for (int first = 0; first < kRows; first += kThreads / kChunks) {
        const int row = first + threadIdx.x / kChunks;
        const bool valid = wanted && row < rows;
        copy_async_16(to + offset<kChunks * 16>(row, chunk),
                      valid ? from + row * ld + chunk * 8 : from, valid);
    }
}

// Brings the pieces of k and v in the order of their use into a ring, two ahead of it.
class Pieces {
public:
    __device__ __forceinline__ Pieces(const AttentionParams& p, const AttentionTile& tile,
                                      uint32_t ring)
        : p_(p),
          k_(p.k + blockIdx.y * int64_t{p.head_size}),
          v_(p.v + blockIdx.y * int64_t{p.head_size}),
          ring_(ring),
          k_pieces_((p.head_size + 63) / 64),
          v_pieces_(kKeys / 16 * ((p.head_size + kColumns - 1) / kColumns)),
          tiles_(p.ranges + tile.first_range, tile.ranges, tile.keys),
          keys_(tiles_.next()),
          piece_(0),
          filled_(0),
          used_(0) {}

    // Starts the copy of the next piece. Every call commits one group, so that their number
    // tells which pieces have arrived.
    __device__ __forceinline__ void start() {
        if (keys_.count > 0) {
            const uint32_t to = ring_ + filled_ * kPieceBytes;
            if (piece_ < k_pieces_) {
                const int column = piece_ * 64;
                copy_piece<kKeys, 8>(to, k_ + keys_.row * p_.ldk + column, p_.ldk, keys_.count,
                                     p_.head_size - column);
            } else {
                copy_values(to, piece_ - k_pieces_);
            }
            if (++piece_ == k_pieces_ + v_pieces_) {
                piece_ = 0;
                keys_ = tiles_.next();
            }
            filled_ = filled_ + 1 == kPieces ? 0 : filled_ + 1;
        }
        commit_copies();
    }

    // Waits for the next piece to use and lets the copy into the place of the last one begin.
    __device__ __forceinline__ uint32_t take() {
        wait_for_copies<kPieces - 2>();
        __syncthreads();
        start();
        const uint32_t piece = ring_ + used_ * kPieceBytes;
        used_ = used_ + 1 == kPieces ? 0 : used_ + 1;
        return piece;
    }

private:
    __device__ __forceinline__ void copy_values(uint32_t to, int piece) {
        const bool halved = p_.head_size > kColumns;
        const int first = (halved ? piece / 2 : piece) * 16;
        const int column = halved ? piece % 2 * kColumns : 0;
        // A tile may end before this piece: its address must then stay inside v.
        const int rows = keys_.count - first;
        const int row = keys_.row + (rows > 0 ? first : 0);
        copy_piece<16, kColumns / 8>(to, v_ + row * p_.ldv + column, p_.ldv, rows,
                                     p_.head_size - column);
    }

    const AttentionParams& p_;
    const bf16* k_;
    const bf16* v_;
    uint32_t ring_;
    int k_pieces_;
    int v_pieces_;
    KeyTiles<kKeys> tiles_;
    KeyTile keys_;
    int piece_;
    int filled_;
    int used_;
};

// Adds to the scores of 16 queries and 32 keys the product over 64 columns.
__device__ __forceinline__ void add_scores(float (&scores)[4][4], uint32_t q, uint32_t k) {
#pragma unroll
    for (int d = 0; d < 4; ++d) {
        uint32_t a[4];
        load_matrices(a, q ^ d * 32);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            uint32_t b[4];
            load_matrices(b, (k ^ d * 32) + n * 16 * 128);
            multiply_accumulate(scores[2 * n], a, b[0], b[1]);
            multiply_accumulate(scores[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Divides the sums by the total weights and stores the warp's columns.
__device__ __forceinline__ void store_sums(const AttentionParams& p, const AttentionTile& tile,
                                           const float (&sums)[kMostColumns / kColumns][4][4][4],
                                           const float* totals) {
    const int lane = threadIdx.x % 32;
    const int first_column = threadIdx.x / 32 * kWarpColumns + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = r * 16 + half * 8 + lane / 4;
            if (row >= tile.queries) continue;
            const float inverse = 1.0f / (totals[row] + totals[kQueries + row]);
            bf16* out =
                p.out + (tile.query + row) * p.ldo + blockIdx.y * int64_t{p.head_size};
#pragma unroll
            for (int part = 0; part < kMostColumns / kColumns; ++part) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const int column = part * kColumns + first_column + n * 8;
                    if (column >= p.head_size) continue;
                    const float* pair = &sums[part][r][n][2 * half];
                    *reinterpret_cast<uint32_t*>(out + column) =
                        pack_bf16(pair[0] * inverse, pair[1] * inverse);
                }
            }
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_wide(const __grid_constant__ AttentionParams p) {
    after_predecessor();
    extern __shared__ __align__(128) unsigned char memory[];
    // Ring of pieces, weights, maxima (later totals) by half of the keys, factors; then q.
    unsigned char* const weights = memory + kPieces * kPieceBytes;
    float* const maxima = reinterpret_cast<float*>(weights + kWeightBytes);
    float* const factors = maxima + 2 * kQueries;
    const uint32_t q_tile = shared_address(factors + kQueries);

    const AttentionTile tile = p.tiles[blockIdx.x];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int first_query = warp / 2 * 16;  // of the warp's scores
    const int key_half = warp % 2;
    const int row = first_query + lane / 4;
    const int k_pieces = (p.head_size + 63) / 64;

    const bf16* q = p.q + tile.query * p.ldq + blockIdx.y * int64_t{p.head_size};
    for (int i = 0; i < k_pieces; ++i) {
        copy_piece<kQueries, 8>(q_tile + i * kPieceBytes, q + i * 64, p.ldq, tile.queries,
                                p.head_size - i * 64);
    }
    Pieces pieces(p, tile, shared_address(memory));
    pieces.start();
    pieces.start();

    // Addresses of matrix loads: left operands take rows, then columns from their four
    // matrices, and so does v, whose rows are the inner dimension; k columns, then rows.
    const int matrix = lane / 8;
    const int rows_row = lane % 8 + matrix % 2 * 8;
    const uint32_t q_first = q_tile + offset<128>(first_query + rows_row, matrix / 2);
    const uint32_t k_first = offset<128>(key_half * 32 + lane % 8 + matrix / 2 * 8, matrix % 2);
    const uint32_t weights_first = shared_address(weights) + offset<128>(rows_row, matrix / 2);
    const uint32_t v_first = offset<2 * kColumns>(rows_row, warp * (kWarpColumns / 8) + matrix / 2);

    // By part of the columns, sixteen of queries, eight of the warp's columns.
    float sums[kMostColumns / kColumns][4][4][4] = {};
    float max[2] = {negative_infinity(), negative_infinity()};
    float total[2] = {};  // of the lane's own keys
    const float scale = p.scale * kLog2E;

    KeyTiles<kKeys> key_tiles(p.ranges + tile.first_range, tile.ranges, tile.keys);
    for (KeyTile keys = key_tiles.next(); keys.count > 0; keys = key_tiles.next()) {
        float scores[4][4] = {};
        for (int i = 0; i < k_pieces; ++i) {
            const uint32_t k = pieces.take();
            add_scores(scores, q_first + i * kPieceBytes, k + k_first);
        }

        const int first_key = key_half * 32 + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = negative_infinity();
#pragma unroll
            for (int n = 0; n < 4; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[n][2 * half + i];
                    if (first_key + n * 8 + i >= keys.count) score = negative_infinity();
                    highest = fmaxf(highest, score);
                }
            }
            highest = quad_max(highest);
            if (lane % 4 == 0) maxima[key_half * kQueries + row + half * 8] = highest;
        }
        __syncthreads();

        bool rose = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* others = maxima + row + half * 8;
            const float highest = fmaxf(max[half], fmaxf(others[0], others[kQueries]));
            const float base = softmax_base(highest, scale);
            const float factor = softmax_shrink(max[half], scale, base);
            rose |= highest > max[half];
            max[half] = highest;
            if (key_half == 0 && lane % 4 == 0) factors[row + half * 8] = factor;
            float added = 0.0f;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const float low = exp2_approximate(fmaf(scores[n][2 * half], scale, -base));
                const float high = exp2_approximate(fmaf(scores[n][2 * half + 1], scale, -base));
                added += low + high;
                const uint32_t at = offset<128>(row + half * 8, key_half * 4 + n) + lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(weights + at) = pack_bf16(low, high);
            }
            total[half] = fmaf(total[half], factor, added);
        }
        // Maxima rarely rise after the first tiles. This barrier also shows the weights to all.
        if (__syncthreads_or(rose)) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float factor = factors[r * 16 + e / 2 * 8 + lane / 4];
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        sums[0][r][n][e] *= factor;
                        sums[1][r][n][e] *= factor;
                    }
                }
            }
        }

        for (int group = 0; group < kKeys / 16; ++group) {
            uint32_t a[4][4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                load_matrices(a[r], (weights_first ^ group * 32) + r * 16 * 128);
            }
#pragma unroll
            for (int part = 0; part < kMostColumns / kColumns; ++part) {
                if (part * kColumns >= p.head_size) break;
                const uint32_t v = pieces.take() + v_first;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    uint32_t b[4];
                    load_matrices_transposed(b, v ^ n * 32);
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        multiply_accumulate(sums[part][r][2 * n], a[r], b[0], b[1]);
                        multiply_accumulate(sums[part][r][2 * n + 1], a[r], b[2], b[3]);
                    }
                }
            }
        }
    }

    // The last reading of the maxima lies before a barrier that all have passed.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(total[half]);
        if (lane % 4 == 0) maxima[key_half * kQueries + row + half * 8] = sum;
    }
    __syncthreads();
    store_sums(p, tile, sums, maxima);
}
