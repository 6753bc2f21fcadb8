// Warpgroup matrix products of Hopper (sm_90a): d[64, N] (+)= A[64, 16] · B[16, N], bf16 in, f32 out.
//
// The 128 threads of a warpgroup call together. Accumulator layout: with warp w of the warpgroup
// and lane l, d[4j + 0, 1] are row 16w + l/4, columns 8j + 2(l % 4) + 0, 1, and d[4j + 2, 3] the
// same columns eight rows below. A from registers: a[0] holds row 16w + l/4, columns
// 2(l % 4) + 0, 1 (the first in the low half), a[1] eight rows below, a[2] and a[3] the same
// eight columns to the right. So the columns 16i to 16i + 15 of an accumulator, rounded and
// packed in pairs of d[8i + 0..7], are the A fragment of k-step i of a following product.
//
// B_MN false: B is stored "K-major", row n of the storage holding the K elements of column n.
// B_MN true: "MN-major", row k of the storage holding N consecutive elements (as V in P·V).
//
// Order of use: wgmma_pin(d); wgmma_fence(); products...; wgmma_commit(); wgmma_wait<0>();
// wgmma_pin(d). The products read and write registers and shared memory asynchronously.
// wgmma_pin keeps the compiler from moving uses of the registers into that window, where the
// assembler would have to serialise the products to keep them right.
#pragma once

#include <stdint.h>

// Before the first product, and whenever ordinary code wrote registers a product uses.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of the products issued since the last commit.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` of the latest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void wgmma_pin(uint32_t (&a)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// ss: A and B by shared-memory descriptors. rs: A from registers. Without `accumulate` the old
// values of d are ignored, so they need not be cleared first.
template <int N>
struct Wgmma;

#define WGMMA_R4 "%0, %1, %2, %3"
#define WGMMA_R8 WGMMA_R4 ", %4, %5, %6, %7"
#define WGMMA_R16 WGMMA_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_R32                                                  \
    WGMMA_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25" \
              ", %26, %27, %28, %29, %30, %31"
#define WGMMA_R48                                                  \
    WGMMA_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41" \
              ", %42, %43, %44, %45, %46, %47"
#define WGMMA_R64                                                  \
    WGMMA_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57" \
              ", %58, %59, %60, %61, %62, %63"
#define WGMMA_R96                                                  \
    WGMMA_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73" \
              ", %74, %75, %76, %77, %78, %79, %80, %81, %82, %83" \
              ", %84, %85, %86, %87, %88, %89, %90, %91, %92, %93" \
              ", %94, %95"
#define WGMMA_R128                                                           \
    WGMMA_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105"     \
              ", %106, %107, %108, %109, %110, %111, %112, %113, %114, %115" \
              ", %116, %117, %118, %119, %120, %121, %122, %123, %124, %125" \
              ", %126, %127"

#define WGMMA_AT(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define WGMMA_D4 WGMMA_AT(0)
#define WGMMA_D8 WGMMA_D4, WGMMA_AT(4)
#define WGMMA_D16 WGMMA_D8, WGMMA_AT(8), WGMMA_AT(12)
#define WGMMA_D32 WGMMA_D16, WGMMA_AT(16), WGMMA_AT(20), WGMMA_AT(24), WGMMA_AT(28)
#define WGMMA_D48 WGMMA_D32, WGMMA_AT(32), WGMMA_AT(36), WGMMA_AT(40), WGMMA_AT(44)
#define WGMMA_D64 WGMMA_D48, WGMMA_AT(48), WGMMA_AT(52), WGMMA_AT(56), WGMMA_AT(60)
#define WGMMA_D96                                                                       \
    WGMMA_D64, WGMMA_AT(64), WGMMA_AT(68), WGMMA_AT(72), WGMMA_AT(76), WGMMA_AT(80),    \
        WGMMA_AT(84), WGMMA_AT(88), WGMMA_AT(92)
#define WGMMA_D128                                                                      \
    WGMMA_D96, WGMMA_AT(96), WGMMA_AT(100), WGMMA_AT(104), WGMMA_AT(108), WGMMA_AT(112), \
        WGMMA_AT(116), WGMMA_AT(120), WGMMA_AT(124)

// `count` is n/2 and i0.. are the numbers count + 0.. of the operands after the accumulators:
// inline assembly takes them only as literals.
#define WGMMA_SHAPE(n, count, i0, i1, i2, i3, i4, i5, i6)                                       \
    template <>                                                                                 \
    struct Wgmma<n> {                                                                           \
        template <bool B_MN>                                                                    \
        static __device__ __forceinline__ void ss(float (&d)[count], uint64_t a, uint64_t b,    \
                                                  bool accumulate) {                            \
            asm volatile(                                                                       \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                               \
                "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" WGMMA_R##count "}" \
                ", %" #i0 ", %" #i1 ", p, 1, 1, 0, %" #i3 ";\n}\n"                              \
                : WGMMA_D##count                                                                \
                : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                            \
                  "n"(static_cast<int>(B_MN)));                                                 \
        }                                                                                       \
        template <bool B_MN>                                                                    \
        static __device__ __forceinline__ void rs(float (&d)[count], const uint32_t* a,         \
                                                  uint64_t b, bool accumulate) {                \
            asm volatile(                                                                       \
                "{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                               \
                "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" WGMMA_R##count "}" \
                ", {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}\n" \
                : WGMMA_D##count                                                                \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                           \
                  "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(B_MN)));              \
        }                                                                                       \
    };

WGMMA_SHAPE(8, 4, 4, 5, 6, 7, 8, 9, 10)
WGMMA_SHAPE(16, 8, 8, 9, 10, 11, 12, 13, 14)
WGMMA_SHAPE(32, 16, 16, 17, 18, 19, 20, 21, 22)
WGMMA_SHAPE(64, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA_SHAPE(96, 48, 48, 49, 50, 51, 52, 53, 54)
WGMMA_SHAPE(128, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA_SHAPE(192, 96, 96, 97, 98, 99, 100, 101, 102)
WGMMA_SHAPE(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef WGMMA_SHAPE
#undef WGMMA_D128
#undef WGMMA_D96
#undef WGMMA_D64
#undef WGMMA_D48
#undef WGMMA_D32
#undef WGMMA_D16
#undef WGMMA_D8
#undef WGMMA_D4
#undef WGMMA_AT
#undef WGMMA_R128
#undef WGMMA_R96
#undef WGMMA_R64
#undef WGMMA_R48
#undef WGMMA_R32
#undef WGMMA_R16
#undef WGMMA_R8
#undef WGMMA_R4
