// Causal 3-D convolution on Hopper as a matrix product that gathers its own patches.
//
//   out[t, y, x, o] = bias[o] + Σ ext[t·st + dt][y·sh + dy − kh/2][x·sw + dx − kw/2][c] · weight[o][tap][c]
//
// over dt < kt, dy < kh, dx < kw, c < cin, with tap = (dt·kh + dy)·kw + dx and zeros outside of the
// image. ext is `front` frames (carried [front, height, width, cin], zeros if null) and then x
// [frames, height, width, cin]. weight is packed [cout][taps][cin_padded]. Then, with N = cout:
//   shuffle 0          out [T, H, W, N]
//   shuffle 1, space   channel o = 4c + 2p₁ + p₂ goes to out[t, 2y + p₁, 2x + p₂, c] of [T, 2H, 2W, N/4]
//   shuffle 2, time    channel o = 2c + p goes to out[2t + p, y, x, c] of [2T, H, W, N/2]
//   shuffle 3          the same without the first frame: out[2t + p − 1, …]
// and residual, of the shape of the output, is added if not null. T, H, W are out_frames, out_height
// and out_width. Precision: bf16 in, f32 sums in one fixed order, f32 epilogue, one rounding to bf16.
//
// Limits: cin % 8 == 0 (work is done for cin rounded up to 64), cin_padded % 8 == 0; cout % 8 == 0,
// for time % 16, for space % 32; front < kt where carried is null; all pointers 16-byte aligned;
// out may not overlap an input other than residual at the same place.
//
// The rows of a tile are the pixels of a box of one output frame, box_width (a power of two) by
// rows / box_width, row by row. Of each tap the producer copies the box at its shifted place: the
// copy engine steps by the stride and fills in the zeros of the padding. Frames of zeros in front are
// left out of the sum.
//
// Tensor maps (bf16, 128-byte swizzle, no interleave, zero fill outside):
//   x, carried: (cin, width, height, frames or front), box 64 × box_width·sw × (rows / box_width)·sh × 1
//               with element strides 1, sw, sh, 1 (the driver divides the box by them); 256 at most
//   weight:     (taps·cin_padded, cout), box 64 × columns, as the table says; element strides 1
//                              tile      rows   columns per box   stages   dynamic shared memory
//   conv3d_sm90_256x128        256×128   256    128               4        229440
//   conv3d_sm90_128x256_pair   128×256   128    128               4        229440   cluster of 2
//   conv3d_sm90_128x128        128×128   128    128               6        229472
//   conv3d_sm90_128x64         128×64    128     64               8        229504
// `carried` is not read where the pointer is null; any bytes will do.
//
// Launch: 384 threads; boxes = ⌈W / box_width⌉ · ⌈H / (rows / box_width)⌉ per frame,
// tiles = T · boxes · ⌈cout / columns of the tile⌉, pairs likewise with ⌈boxes / 2⌉.
// grid.x = min(multiprocessors, tiles); for a pair the largest multiple of 2 not above
// min(multiprocessors, 2 · pairs). The cluster size is compiled in.
//
// Why so: nothing but the operands is ever materialised, so a convolution runs like a matrix product
// of the same size; a box of lines of 8 pixels fills one unit of the swizzle with each and keeps the
// overlap of neighbouring taps in L2.

#include "lib/epilogue.cuh"
#include "lib/gemm_sm90.cuh"

struct ConvSm90Params {
    TensorMap x_map, carried_map, weight_map;
    const bf16* x;
    const bf16* carried;
    const bf16* weight;
    const bf16* bias;
    const bf16* residual;
    bf16* out;
    int frames, height, width, cin;
    int out_frames, out_height, out_width, cout;
    int kt, kh, kw, st, sh, sw;
    int front;
    int shuffle;
    int cin_padded;
    int box_width;
};
static_assert(sizeof(ConvSm90Params) == 512, "as on the host");

// How a lane reads eight channels of one target pixel from 64 staged columns, and where they go.
// Lane l finishes rows l / 8 + 4·i; its 8 lanes of a row share the 1, 2 or 4 targets evenly.
struct Target {
    int bits;         // two to this power is the number of targets, neighbours in the columns
    int first;        // first of its columns
    int row, column;  // p₁ and p₂ of space
    int frame;        // p of time
    int spread;       // output pixels per position along each side

    __device__ __forceinline__ explicit Target(int shuffle) {
        const int group = threadIdx.x % 8;
        bits = shuffle == kInPlace ? 0 : shuffle == kToSpace ? 2 : 1;
        const int target = group >> (3 - bits);
        first = ((group & ((8 >> bits) - 1)) << (3 + bits)) + target;
        row = shuffle == kToSpace ? target / 2 : 0;
        column = shuffle == kToSpace ? target % 2 : 0;
        frame = shuffle >= kToTime ? target : 0;
        spread = shuffle == kToSpace ? 2 : 1;
    }
};

template <class Tile>
struct Conv {
    const ConvSm90Params& p;

    using Finish = StagedFinish<Tile, Conv>;

    struct Place {
        int frame, y, x;
        int column;
    };

    __device__ __forceinline__ int box_height() const { return Tile::kRows / p.box_width; }
    __device__ __forceinline__ int boxes_across() const {
        return (p.out_width + p.box_width - 1) / p.box_width;
    }
    __device__ __forceinline__ int boxes() const {
        const int height = box_height();
        return boxes_across() * ((p.out_height + height - 1) / height);
    }
    // Row tiles of a frame. Both blocks of a pair work on one frame, so that they leave out the same
    // taps; an odd last box is paired with one outside of the image.
    __device__ __forceinline__ int row_tiles() const {
        return (boxes() + Tile::kCluster - 1) / Tile::kCluster;
    }
    __device__ __forceinline__ int column_tiles() const { return (p.cout + Tile::kCols - 1) / Tile::kCols; }
    __device__ __forceinline__ int tiles() const { return p.out_frames * row_tiles() * column_tiles(); }

    __device__ __forceinline__ Place place(int tile, int rank) const {
        const int per_frame = row_tiles();
        const TilePosition at(tile, p.out_frames * per_frame, column_tiles());
        const int frame = at.row / per_frame;
        const int box = (at.row - frame * per_frame) * Tile::kCluster + rank;
        const int across = boxes_across();
        const int down = box / across;
        return {frame, down * box_height(), (box - down * across) * p.box_width, at.column * Tile::kCols};
    }
    __device__ __forceinline__ int column(const Place& place) const { return place.column; }
    __device__ __forceinline__ int rows(const Place&) const { return Tile::kRows; }
    __device__ __forceinline__ const TensorMap* columns_map(const Place&) const { return &p.weight_map; }

    // The first tap in time that does not fall on zeros in front.
    __device__ __forceinline__ int first_frame_tap(const Place& place) const {
        return p.carried != nullptr ? 0 : max(0, p.front - place.frame * p.st);
    }
    __device__ __forceinline__ int steps(const Place& place) const {
        const int chunks = (p.cin + Tile::kDepth - 1) / Tile::kDepth;
        return (p.kt - first_frame_tap(place)) * p.kh * p.kw * chunks;
    }

    template <class Step>
    __device__ __forceinline__ void each_step(const Place& place, const Step& step) const {
        const int y = place.y * p.sh - p.kh / 2;
        const int x = place.x * p.sw - p.kw / 2;
        for (int dt = first_frame_tap(place); dt < p.kt; ++dt) {
            const int extended = place.frame * p.st + dt;
            const bool before = extended < p.front;
            const TensorMap* map = before ? &p.carried_map : &p.x_map;
            const int frame = before ? extended : extended - p.front;
            for (int dy = 0; dy < p.kh; ++dy) {
                for (int dx = 0; dx < p.kw; ++dx) {
                    const int tap = (dt * p.kh + dy) * p.kw + dx;
                    for (int c = 0; c < p.cin; c += Tile::kDepth) {
                        step(
                            [&](uint32_t to, uint32_t barrier) {
                                copy_box_4d(to, map, barrier, c, x + dx, y + dy, frame);
                            },
                            tap * p.cin_padded + c);
                    }
                }
            }
        }
    }

    template <class Stage>
    __device__ __forceinline__ void finish(const Place& place, int tile_row, int tile_column,
                                           const Stage& stage, const float* staging) const {
        const int columns_from = place.column + tile_column;
        if (columns_from >= p.cout) return;
        const Target target(p.shuffle);
        const int lane_row = threadIdx.x % 32 / 8;
        const int channels = p.cout >> target.bits;
        const int channel = (columns_from + target.first) >> target.bits;
        const int frames_before = p.shuffle == kToTimeDropFirst ? 1 : 0;
        const int frame = p.shuffle >= kToTime ? 2 * place.frame + target.frame - frames_before : place.frame;
        const bool inside = channel < channels && frame >= 0;

        float bias[8] = {};
        if (p.bias != nullptr && inside) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                bias[j] = widen(p.bias[columns_from + target.first + (j << target.bits)]);
            }
        }
        const int width_bits = __ffs(p.box_width) - 1;
        // Rows l / 8 + 4·i of the piece as offsets of their eight channels in the output.
        int64_t to[4];
        Octet<bf16> residual[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int pixel = tile_row + lane_row + 4 * i;
            const int y = place.y + (pixel >> width_bits);
            const int x = place.x + (pixel & (p.box_width - 1));
            const bool valid = inside && y < p.out_height && x < p.out_width;
            const int64_t rows = int64_t(frame) * p.out_height * target.spread + y * target.spread + target.row;
            const int64_t pixels = rows * p.out_width * target.spread + x * target.spread + target.column;
            to[i] = valid ? pixels * channels + channel : -1;
            if (p.residual != nullptr && valid) residual[i].read(p.residual + to[i]);
        }
        stage();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (to[i] < 0) continue;
            const int row = lane_row + 4 * i;
            float v[8];
            if (p.shuffle == kInPlace) {
                staged_group(v, staging, row, threadIdx.x % 8);
            } else {
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    v[j] = staging[Staging::index(row, target.first + (j << target.bits))];
                }
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] += bias[j];
            residual[i].add_to(v);
            Octet<bf16> result;
            result.round(v);
            result.write(p.out + to[i]);
        }
    }
};

template <class Tile>
__device__ __forceinline__ void conv3d(const ConvSm90Params& p) {
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&p.x_map);
        prefetch_tensor_map(&p.weight_map);
    }
    multiply_tiles<Tile>(Conv<Tile>{p});
}

// Entry points; __launch_bounds__(…, 1) is what lets the warpgroups share out the registers anew.
#define CONV_KERNEL(name, rows, columns)                                           \
    extern "C" __global__ void __launch_bounds__(384, 1)                           \
        name(const __grid_constant__ ConvSm90Params p) {                           \
        conv3d<Tile<rows, columns, 1>>(p);                                         \
    }
#define CONV_PAIR_KERNEL(name, rows, columns)                                      \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) \
        name(const __grid_constant__ ConvSm90Params p) {                           \
        conv3d<Tile<rows, columns, 2>>(p);                                         \
    }

CONV_KERNEL(conv3d_sm90_256x128, 256, 128)
CONV_PAIR_KERNEL(conv3d_sm90_128x256_pair, 128, 256)
CONV_KERNEL(conv3d_sm90_128x128, 128, 128)
CONV_KERNEL(conv3d_sm90_128x64, 128, 64)
