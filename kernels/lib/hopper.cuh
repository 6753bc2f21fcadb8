// Building blocks for sm_90a: tensor maps and the bulk copies that read through them, mbarriers,
// named barriers, register re-allocation and the shared-memory matrix descriptors of wgmma.
//
// Shared memory is named by 32-bit addresses (`shared_address`) throughout.
#pragma once

#include "mma.cuh"

// An opaque tensor map, encoded on the host by the driver (cuTensorMapEncodeTiled). It must stay in
// the parameters of the kernel (`const __grid_constant__`) or in global memory.
struct alignas(64) TensorMap {
    uint64_t words[16];
};
static_assert(sizeof(TensorMap) == 128, "as the driver encodes it");

// ---- mbarriers: 8 bytes of shared memory, 8-byte aligned -----------------------------------------
//
// A phase ends when `arrivals` threads have arrived and all announced bytes have landed. Waiting for
// parity 0 returns when phase 0, 2, … has ended; waiting for parity 1 on a fresh barrier returns at
// once, so a producer of a ring starts with parity 1 and a consumer with parity 0.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}

// After the initialisation, before the block's __syncthreads: makes the barriers visible to the copy
// engine (and to the other blocks of a cluster).
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// One arrival that also announces `bytes` to be written by bulk copies in this phase.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    while (!barrier_test(barrier, parity)) {
    }
}

// ---- bulk tensor copies, global to shared --------------------------------------------------------
//
// One thread issues a copy of a whole box; coordinates are in elements, fastest dimension first, and
// may lie outside of the tensor (negative too): what is outside arrives as zeros and counts towards
// the announced bytes. The destination is 128-byte aligned, for a swizzled box 1024-byte aligned.

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_box_2d(uint32_t to, const TensorMap* map, uint32_t barrier, int x,
                                            int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void copy_box_4d(uint32_t to, const TensorMap* map, uint32_t barrier, int x,
                                            int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

// The same box to the same place of every block of the cluster named in `blocks` (bit i: rank i),
// completing on the barrier at the same address there. Each receiver announces the bytes itself.
__device__ __forceinline__ void copy_box_2d_multicast(uint32_t to, const TensorMap* map, uint32_t barrier,
                                                      int x, int y, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;\n" ::"r"(to),
        "l"(map), "r"(barrier), "h"(blocks), "r"(x), "r"(y)
        : "memory");
}

// A box from shared memory to global; what lies outside of the tensor is left out. Copies issued by a
// thread since its last commit form a group; `box_stores_read` waits until at most `kPending` of the
// thread's latest groups still have to read shared memory.
__device__ __forceinline__ void store_box_2d(const TensorMap* map, int x, int y, uint32_t from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map),
        "r"(from), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void commit_box_stores() {
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void box_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later accesses of the copy engine
// and the tensor cores: needed between writing a tile and handing it to them.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// ---- warpgroups ----------------------------------------------------------------------------------

// Every warp of a warpgroup calls the same one, in one branch per role; N is a multiple of 8. The
// kernel needs __launch_bounds__(threads, 1).
template <int N>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Counts as having come to the barrier without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters of blocks --------------------------------------------------------------------------

// All threads of all blocks of the cluster arrive and then wait, in turn, each warp converged. Orders
// their memory accesses. A block may not end while another can still write to its shared memory, nor
// be written to before it has begun.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// Arrives at the barrier that lies at this address in the block of rank `rank`.
// Of its own block's scope: what is handed back was read by wgmma, whose end the thread has awaited,
// so there is nothing to release, and a release to the cluster would cost a full memory barrier
// (a third of a matrix product's time).
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Writes to shared memory of the block of rank `rank`, at this address there.
__device__ __forceinline__ void store_at(uint32_t to, int rank, float4 value) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n"
        "}\n" ::"r"(to),
        "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
}

// ---- warps ---------------------------------------------------------------------------------------

// One thread of a converged warp; always the same one.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred leader;\n"
        "elect.sync _|leader, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, leader;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

// Tells the compiler that `x` is the same in all threads of the warp, so that branches on it are
// uniform.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// ---- matrix descriptors for tiles that a bulk copy wrote with the 128-byte swizzle ---------------
//
// Such a tile is `rows` rows of 128 bytes (64 bf16 values); the 16-byte chunk c of row r lies at
// chunk c ^ (r % 8). The tile starts on a multiple of 1024 bytes.

namespace descriptor {
constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;

__device__ __forceinline__ uint64_t encode(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128;
}

// The rows are rows of A or columns of B and the 64 values run along k. Groups of 8 rows are 1024
// bytes apart. Advance along k by 16 values with `advance(d, 32)`.
__device__ __forceinline__ uint64_t k_major(uint32_t tile) { return encode(tile, 16, 1024); }

// The rows run along k and the 64 values along m or n (B then needs the transpose flag). Further
// groups of 64 values lie `chunk_bytes` apart in tiles of their own. Advance along k by 16 rows with
// `advance(d, 2048)`.
__device__ __forceinline__ uint64_t mn_major(uint32_t tile, uint32_t chunk_bytes) {
    return encode(tile, chunk_bytes, 1024);
}

// The same matrix `bytes` (a multiple of 16) further on. Tiles end below 256 KiB, so the address
// field cannot overflow into the next one.
__device__ __forceinline__ uint64_t advance(uint64_t d, uint32_t bytes) { return d + (bytes >> 4); }
}  // namespace descriptor
