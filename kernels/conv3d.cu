// Causal 3-D convolution of channels-last frames on the tensor cores of sm_80 and newer, as a
// matrix product whose rows are gathered: row (t, y, x) of the left matrix is the patch under
// the kernel at that position, which is never stored.
//
//   x [frames, height, width, cin], carried [front, height, width, cin] or null;
//   ext = carried (zeros if null) followed by x;
//   sum[t, y, x, o] = Σ over taps (dt, dy, dx) and channels c of
//       ext[t·st + dt, y·sh + dy - kh/2, x·sw + dx - kw/2, c] · weight[o, tap, c],
//   zero outside; tap = (dt·kh + dy)·kw + dx, weight packed as [cout, taps, cin_padded].
//
//   out = shuffle(sum + bias) + residual, of T = out_frames, H = out_height, W = out_width:
//     shuffle 0: [T, H, W, cout]
//             1: channel 4c + 2·p1 + p2 to [t, 2y + p1, 2x + p2, c] of [T, 2H, 2W, cout/4]
//             2: channel 2c + p to [2t + p, y, x, c] of [2T, H, W, cout/2]
//             3: the same without the first frame, [2T - 1, H, W, cout/2]
//   out_frames = (frames + front - kt)/st + 1, height and width likewise rounded up; bias and
//   residual (of the output's shape) may be null.
//
// bf16 in, f32 sums and epilogue, one rounding to bf16. The order of summation depends neither
// on the launch nor on the tile: equal inputs give equal bits.
//
// Limits: kt, kh, kw at most 3; less than 2³¹ pixels in ext and in the output; cin_padded a
// multiple of 8, at least cin; all pointers aligned to 16 bytes; cout a multiple of 4 for
// shuffle 1, of 2 for 2 and 3; `out` overlaps no input but may be the residual itself.
// conv3d_MxN: cin a multiple of 8. conv3d_any_MxN: any cin, gathered one by one, for images.
// Any number of positions and channels; stores are widest where cout is a multiple of 8.
//
// Launch: grid ⌈positions/M⌉·⌈cout/N⌉ (one-dimensional), positions = T·H·W:
//
//   entry                              threads   dynamic shared memory
//   conv3d_256x128                     256       73856
//   conv3d_128x128                     128       49280
//   conv3d_128x64, conv3d_any_128x64   128       49280
//   conv3d_64x64                       128       49280   few positions
//   conv3d_128x32, conv3d_any_128x32   128       41088   cout ≤ 32
//   conv3d_128x16                      128       36992   cout ≤ 16
//
// A thread copies always the same chunk of eight channels for the same few rows. So a row's
// (t, y, x) is taken apart once, into a pixel number and one bit for each tap that says whether
// the pixel there exists; walking along the inner dimension, the thread keeps only its tap and
// channel, and a table in shared memory says how far a tap is from the first. The carried
// frames are reached by the same number from another base.

#include "lib/epilogue.cuh"
#include "lib/gemm_tile.cuh"
#include "lib/launch.cuh"

struct ConvParams {
    const bf16* x;
    const bf16* carried;
    const bf16* weight;
    const bf16* bias;
    const bf16* residual;
    bf16* out;
    int frames;
    int height;
    int width;
    int cin;
    int out_frames;
    int out_height;
    int out_width;
    int cout;
    int kt;
    int kh;
    int kw;
    int st;
    int sh;
    int sw;
    int front;
    int shuffle;
    int cin_padded;
    int pad;
};
static_assert(sizeof(ConvParams) == 120, "as on the host");

constexpr int kMostTaps = 27;
constexpr int kTable = 128;  // bytes of shared memory for it
static_assert(kMostTaps * sizeof(int) <= kTable, "one entry for each tap");

// Pixels from the first tap to each tap.
__device__ __forceinline__ void fill_table(const ConvParams& p, int* table) {
    const int tap = threadIdx.x;
    if (tap < p.kt * p.kh * p.kw) {
        const int line = tap / p.kw;
        const int dx = tap - line * p.kw, dt = line / p.kh, dy = line - dt * p.kh;
        table[tap] = (dt * p.height + dy) * p.width + dx;
    }
    __syncthreads();
}

// Row source: the patches at kM positions from `first` on, zeros below the last.
template <typename Tile, bool kScalar>
class PatchRows {
public:
    __device__ __forceinline__ PatchRows(const ConvParams& params, const int* table, int first)
        : p(params), table(table) {
        const int row = threadIdx.x / Tile::kChunks;
        const int chunk = threadIdx.x % Tile::kChunks;
        to = Tile::slot_of(row, chunk);
        tap = chunk * 8 / p.cin_padded;
        channel = chunk * 8 - tap * p.cin_padded;
        const int64_t frame = static_cast<int64_t>(p.height) * p.width * p.cin;
        carried = p.carried + p.front * frame;
        slice_taps = Tile::kDepth / p.cin_padded;
        slice_channels = Tile::kDepth - slice_taps * p.cin_padded;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) place(i, first + row + i * kPassRows);
    }

    __device__ __forceinline__ void fetch(uint32_t stage) {
        const bool inside = channel < p.cin && tap < p.kt * p.kh * p.kw;
        const int away = inside ? table[tap] : 0;
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const bool valid = inside && (taps[i] >> tap & 1) != 0;
            const bool before = tap < taps[i] >> kMostTaps;
            const bf16* from = (before ? carried : p.x) + channel;
            copy(stage + to + i * kPassRows * Tile::kLine,
                 from + static_cast<int64_t>(pixel[i] + away) * p.cin, valid);
        }
        tap += slice_taps;
        channel += slice_channels;
        if (channel >= p.cin_padded) {
            tap += 1;
            channel -= p.cin_padded;
        }
    }

private:
    // The block's threads cover kPassRows rows at a time.
    static constexpr int kPassRows = Tile::kThreads / Tile::kChunks;
    static constexpr int kPasses = Tile::kM / kPassRows;
    static_assert(Tile::kM % kPassRows == 0, "no row is left over");

    // Takes position `row` apart.
    __device__ __forceinline__ void place(int i, int row) {
        const int line = row / p.out_width;
        const int t = line / p.out_height;
        const int e = t * p.st;  // frame of the first tap, counted with those in front
        const int y = (line - t * p.out_height) * p.sh - p.kh / 2;
        const int x = (row - line * p.out_width) * p.sw - p.kw / 2;
        pixel[i] = ((e - p.front) * p.height + y) * p.width + x;

        uint32_t across = 0;  // which taps of a line exist
        for (int dx = 0; dx < p.kw; ++dx) {
            if (x + dx >= 0 && x + dx < p.width) across |= 1u << dx;
        }
        const int least = p.carried != nullptr ? 0 : p.front;
        uint32_t exist = 0;
        for (int dt = 0; dt < p.kt; ++dt) {
            if (e + dt < least || e + dt >= p.front + p.frames) continue;
            for (int dy = 0; dy < p.kh; ++dy) {
                if (y + dy < 0 || y + dy >= p.height) continue;
                exist |= across << ((dt * p.kh + dy) * p.kw);
            }
        }
        if (t >= p.out_frames) exist = 0;
        const int before = e < p.front ? min(p.front - e, p.kt) * p.kh * p.kw : 0;
        taps[i] = exist | static_cast<uint32_t>(before) << kMostTaps;
    }

    __device__ __forceinline__ void copy(uint32_t to, const bf16* from, bool valid) const {
        if constexpr (kScalar) {
            Pack<bf16, 8> values;
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                values[c] = valid && channel + c < p.cin ? from[c] : narrow<bf16>(0.0f);
            }
            store(static_cast<bf16*>(__cvta_shared_to_generic(to)), values);
        } else {
            copy_async_16(to, from, valid);
        }
    }

    const ConvParams& p;
    const int* table;
    const bf16* carried;     // where frame 0 of x would follow on the carried ones
    int pixel[kPasses];      // each row's first tap, counted from the start of x
    uint32_t taps[kPasses];  // low bits: which taps exist; above: how many are in front of x
    int tap, channel;        // of this thread's chunk of the next slice
    int slice_taps, slice_channels;  // from one slice to the next
    uint32_t to;
};

template <typename Tile, bool kScalar = false>
__device__ __forceinline__ void conv3d(const ConvParams& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int positions = p.out_frames * p.out_height * p.out_width;
    const int inner = p.kt * p.kh * p.kw * p.cin_padded;
    const TilePlace place = place_of_block<Tile>(positions, p.cout);
    int* table = reinterpret_cast<int*>(shared + Tile::kShared);
    fill_table(p, table);
    PatchRows<Tile, kScalar> rows(p, table, place.row);
    MatrixRows<Tile, Tile::kN> weights(p.weight, inner, place.column, p.cout, inner);
    Sums<Tile> sums;
    const int slices = (inner + Tile::kDepth - 1) / Tile::kDepth;
    multiply_tile(rows, weights, slices, shared_address(shared), sums);
    store_tile<Tile>(ConvEpilogue<ConvParams>(p), place, reinterpret_cast<float*>(shared), sums);
}

extern "C" {

__global__ void __launch_bounds__(256, 1) conv3d_256x128(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile256x128>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_128x128(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile128x128>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_128x64(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile128x64>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_64x64(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile64x64>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_128x32(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile128x32>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_128x16(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile128x16>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_any_128x64(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile128x64, true>(p);
}

__global__ void __launch_bounds__(128, 2) conv3d_any_128x32(const __grid_constant__ ConvParams p) {
    after_predecessor();
    conv3d<Tile128x32, true>(p);
}

}  // extern "C"
