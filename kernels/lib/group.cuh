// Several problems of one kind in one launch, so that small ones do not leave a device idle one after
// the other. They may touch nothing that another of them writes.
#pragma once

// Up to kMost problems. Units of work (blocks, or tiles) are numbered through: problem i has those from
// first[i] to the first of the next, the last problem those to `end`. Places beyond the last have
// first = INT_MAX.
template <class Problem, int kMost>
struct Group {
    int end;
    int first[kMost];
    Problem problem[kMost];

    // The problem that unit `unit` belongs to.
    __device__ __forceinline__ int of(int unit) const {
        int found = 0;
#pragma unroll
        for (int i = 1; i < kMost; ++i) {
            if (unit >= first[i]) found = i;
        }
        return found;
    }
};
