// What the attention kernels share: their arguments, the walk over ranges of keys and the
// arithmetic of the online softmax.
#pragma once

#include "types.cuh"

// Queries that one thread block answers: rows `query .. query + queries` of q and out, the
// first of them at `position` in its segment. They see the keys of the ranges
// `first_range .. first_range + ranges` of the list, `keys` altogether.
struct AttentionTile {
    int query;
    int queries;
    int position;
    int first_range;
    int ranges;
    int keys;
    int pad0;
    int pad1;
};
static_assert(sizeof(AttentionTile) == 32, "as on the host");

// Rows `start .. start + count` of k and v.
struct KeyRange {
    int start;
    int count;
};
static_assert(sizeof(KeyRange) == 8, "as on the host");

struct AttentionParams {
    const bf16* q;
    const bf16* k;
    const bf16* v;
    bf16* out;
    const AttentionTile* tiles;
    const KeyRange* ranges;
    const float* bias;  // [heads, bias_span] by key position − query position; may be null
    int64_t ldq;
    int64_t ldk;
    int64_t ldv;
    int64_t ldo;
    float scale;
    int heads;
    int head_size;
    int causal;
    int bias_span;  // odd; the middle element belongs to relative position 0
    int pad;
};
static_assert(sizeof(AttentionParams) == 112, "as on the host");

// Consecutive rows of k and v, the first at `position` in the concatenation of the ranges.
struct KeyTile {
    int row;
    int count;
    int position;
};

// Cuts the ranges one after another into tiles of at most kKeys rows, so that only the last
// tile of a range is partial. Ends, with tiles of no rows, after `limit` keys.
template <int kKeys>
class KeyTiles {
public:
    __device__ __forceinline__ KeyTiles(const KeyRange* first, int ranges, int limit)
        : range_(first), end_(first + ranges), row_(0), left_(0), position_(0), limit_(limit) {}

    __device__ __forceinline__ KeyTile next() {
        while (left_ == 0 && range_ != end_) {
            row_ = range_->start;
            left_ = range_->count;
            ++range_;
        }
        const KeyTile tile{row_, min(kKeys, min(left_, limit_ - position_)), position_};
        row_ += tile.count;
        left_ -= tile.count;
        position_ += tile.count;
        return tile;
    }

private:
    const KeyRange* range_;
    const KeyRange* end_;
    int row_;
    int left_;
    int position_;
    int limit_;
};

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// 2^x to 22 bits; 2^−∞ = 0, NaN stays NaN.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// The exponent that is subtracted from a row's scaled scores. While every score is −∞ the
// maximum is too, and −∞ − (−∞) would turn weights that are 0 into NaN.
__device__ __forceinline__ float softmax_base(float max, float scale) {
    return max == negative_infinity() ? 0.0f : __fmul_rn(max, scale);
}

// The factor on what was summed under an earlier maximum. The product is rounded as the base's
// was: contracted with the difference, an unchanged maximum would not give exactly 1.
__device__ __forceinline__ float softmax_shrink(float earlier_max, float scale, float base) {
    return exp2_approximate(__fmul_rn(earlier_max, scale) - base);
}

// Reductions over the four lanes that share the rows of a 16×8 accumulator.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
